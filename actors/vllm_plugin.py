"""What vLLM's `vllm.general_plugins` entry point calls, in every process vLLM starts."""

from __future__ import annotations

import torch

TRANSFER = "buckets"  # our weight transfer among vLLM's
CPU_NORM = "cpu_kernel"  # of the IR's providers of rms_norm
LANES = 16  # elements of a vector at most: the kernel refuses rows that are no multiple of its own
_BACKEND = "vllm.model_executor.models.transformers"


def register() -> None:
    """Enter the bridge (Auto classes, vLLM architectures) and our weight transfer. Calling again is harmless."""
    from rlhf import bridge  # before vLLM: it prepares for torchvision

    bridge.register()
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    _inspect_here()
    _offer_cpu_norm()
    known = ModelRegistry.get_supported_archs()
    for name, moe in bridge.ARCHITECTURES.items():
        served_by = "TransformersMultiModalMoEForCausalLM" if moe else "TransformersMultiModalForCausalLM"
        if name not in known:
            ModelRegistry.register_model(name, f"{_BACKEND}:{served_by}")
    if TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER, "actors.vllm_weights", "BucketTransferEngine")


def _offer_cpu_norm() -> None:
    """Let engines on a CPU take vLLM's compiled RMSNorm (one call where the IR's own makes seven: a sixth of a small
    model's step), which vLLM 0.32 offers to GPUs only."""
    from vllm import ir
    from vllm.platforms import current_platform

    if CPU_NORM in ir.ops.rms_norm.impls:
        return
    current_platform.import_kernels()

    @ir.ops.rms_norm.register_impl(CPU_NORM, supported=current_platform.is_cpu(), supports_args=_plain)
    def rms_norm(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,  # noqa: ARG001 - vLLM's signature
    ) -> torch.Tensor:
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ops._C.rms_norm(found, x.contiguous(), weight, epsilon)
        return found


def _plain(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,  # noqa: ARG001 - vLLM's signature
    variance_size: int | None = None,
) -> bool:
    """What the kernel computes: whole rows of whole vectors, with a weight of their own type."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.shape[-1] % LANES == 0


def _inspect_here() -> None:
    """On a CPU, look at a model's class in this process. vLLM 0.32 does so in a new one, lest CUDA start in this: 10 s
    of imports more, and it fails beside a torchvision whose operators only we declare (rlhf.vision_ops)."""
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        registry._run_in_subprocess = lambda inspect: inspect()
