"""What vLLM's `vllm.general_plugins` entry point calls, in every process vLLM starts.

vLLM 0.32 inspects models in a subprocess of its own, which knows our architectures only through this entry point.
"""

from __future__ import annotations

_BACKEND = "vllm.model_executor.models.transformers"


def register() -> None:
    """Enter the bridge (Auto classes, vLLM architectures) and the `cpu` weight transfer. Calling again is harmless."""
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
