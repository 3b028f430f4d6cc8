"""Which layers of an upcycled decoder are mixtures of experts. Needs no torch."""

from __future__ import annotations

from typing import get_args

from rlhf.recipe import SparseLayers


def dense_layers(which: str, layers: int) -> list[int]:
    """Those that stay dense (MoE-LLaVA, 2401.15947, section 4.3): every_second makes 0, 2, 4, … mixtures."""
    sparse = {
        "all": range(layers),
        "every_second": range(0, layers, 2),
        "first_half": range(layers // 2),
        "second_half": range(layers // 2, layers),
    }
    if which not in sparse:
        raise ValueError(f"unknown layers {which!r}; allowed: {', '.join(get_args(SparseLayers))}")
    return [layer for layer in range(layers) if layer not in sparse[which]]
