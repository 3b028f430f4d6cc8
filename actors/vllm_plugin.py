"""What vLLM's `vllm.general_plugins` entry point calls, in every process vLLM starts."""

from __future__ import annotations

_BACKEND = "vllm.model_executor.models.transformers"


def register() -> None:
    """Enter the bridge (Auto classes, vLLM architectures) and the `cpu` weight transfer. Calling again is harmless."""
    from rlhf import bridge  # before vLLM: it prepares for torchvision

    bridge.register()
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    _inspect_here()
    known = ModelRegistry.get_supported_archs()
    for name, moe in bridge.ARCHITECTURES.items():
        served_by = "TransformersMultiModalMoEForCausalLM" if moe else "TransformersMultiModalForCausalLM"
        if name not in known:
            ModelRegistry.register_model(name, f"{_BACKEND}:{served_by}")
    if "cpu" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("cpu", "actors.weights", "CpuWeightTransferEngine")


def _inspect_here() -> None:
    """On a CPU, look at a model's class in this process. vLLM 0.32 does so in a new one, lest CUDA start in this: 10 s
    of imports more, and it fails beside a torchvision whose operators only we declare (rlhf.vision_ops)."""
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        registry._run_in_subprocess = lambda inspect: inspect()
