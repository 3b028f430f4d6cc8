"""What vLLM's `vllm.general_plugins` entry point calls, in every process vLLM starts.

vLLM 0.32 inspects models in a subprocess of its own, which knows our architectures only through this entry point.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_BACKEND = "vllm.model_executor.models.transformers"
_VISION_OPS = ("torchvision::nms", "torchvision::qnms")


def register() -> None:
    """Enter the bridge (Auto classes, vLLM architectures) and the `cpu` weight transfer. Calling again is harmless."""
    define_vision_ops()
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from rlhf import bridge

    bridge.register()
    known = ModelRegistry.get_supported_archs()
    for name, moe in bridge.ARCHITECTURES.items():
        served_by = "TransformersMultiModalMoEForCausalLM" if moe else "TransformersMultiModalForCausalLM"
        if name not in known:
            ModelRegistry.register_model(name, f"{_BACKEND}:{served_by}")
    if "cpu" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("cpu", "actors.weights", "CpuWeightTransferEngine")


def define_vision_ops() -> None:
    """Declare torchvision's C++ operators where its wheel cannot load them.

    For torchvision 0.28.0 from PyPI (a CUDA build) beside CPU torch 2.13: importing it registers fake kernels for
    operators its extension never defined, and every transformers image import fails. Must run before torchvision is
    imported. Does nothing without torchvision, or where the operators exist.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
    known = set(torch._C._dispatch_get_all_op_names())
    for name in _VISION_OPS:
        if name not in known:
            torch.library.define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
