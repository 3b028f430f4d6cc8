"""LaVIN (2305.15023, section 3.2): adapters in every layer, mixed by whether there is a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.bridge.decoders import DECODERS, SameSizes
from rlhf.slots import at_least


@DECODERS.register
@dataclass(frozen=True)
class ModalityAdapter(SameSizes):
    """Two low-rank updates to what attention reads, weighted by a router that sees a learned token alone, of rows with
    a picture or of rows without. `router_temperature` as published for 7B; 5 for 13B."""

    type: ClassVar[str] = "modality_adapter"
    told: ClassVar[str] = "modality"
    adapter_rank: int = 8
    adapter_groups: int = 2
    adapter_scale: float = 1.0
    router_temperature: float = 10.0

    def __post_init__(self) -> None:
        at_least("decoder.modality_adapter", self, 1, ("adapter_rank", "adapter_groups"))
        if self.adapter_rank % self.adapter_groups:
            raise ValueError(
                f"decoder.modality_adapter adapter_rank = {self.adapter_rank} does not divide into adapter_groups = "
                f"{self.adapter_groups}"
            )

    def parameters(self, table: Mapping[str, Any], inside: int) -> int:
        hidden = table["hidden_size"]
        layer = adapter_parameters(hidden, self.adapter_rank, self.adapter_groups)
        return int(inside + table["num_hidden_layers"] * layer + 2 * hidden)

    def classes(self) -> tuple[Any, Any]:
        from rlhf.bridge.layers.modality_adapter import ModalityAdapterConfig, ModalityAdapterModel

        return ModalityAdapterConfig, ModalityAdapterModel


def adapter_parameters(width: int, rank: int, groups: int) -> int:
    """Of one adapter with its router: 20 width + 10 with the published rank and groups."""
    down, up, router = width * rank + rank, width * rank // groups + width, 2 * width + 2
    return down + 2 * up + router
