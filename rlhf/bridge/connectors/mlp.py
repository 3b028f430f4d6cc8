"""Projections that see one patch, or one small block of patches, at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.connectors import CONNECTORS
from rlhf.bridge.slots import one_of

if TYPE_CHECKING:
    from torch import nn

KINDS = ("linear", "mlp2x_gelu", "pixel_shuffle_mlp")


@CONNECTORS.register
@dataclass(frozen=True)
class MLPConnector:
    """linear: LLaVA · mlp2x_gelu: LLaVA-1.5 (2310.03744) · pixel_shuffle_mlp: SAIL-VL2 (2509.14033) and InternVL:
    factor x factor patches -> LayerNorm(factor² C) -> Linear -> GELU -> Linear. `factor` is for pixel_shuffle_mlp."""

    type: ClassVar[str] = "mlp"
    kind: str = "mlp2x_gelu"
    factor: int = 2

    def __post_init__(self) -> None:
        one_of("connector.mlp kind", self.kind, KINDS)
        if self.factor < 1:
            raise ValueError(f"connector.mlp factor must be at least 1, got {self.factor}")

    def num_tokens(self, grid: tuple[int, int]) -> int:
        rows, cols = grid
        if self.kind != "pixel_shuffle_mlp":
            return rows * cols
        if rows % self.factor or cols % self.factor:
            raise ValueError(f"a grid of {grid} patches does not divide by connector.mlp factor {self.factor}")
        return (rows // self.factor) * (cols // self.factor)

    def build(self, grid: tuple[int, int], vision_width: int, text_width: int) -> nn.Module:
        from torch import nn

        from rlhf.bridge.layers.shuffle import PixelShuffle

        if self.kind == "linear":
            return nn.Sequential(nn.Linear(vision_width, text_width))
        if self.kind == "mlp2x_gelu":
            return nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))
        wide = vision_width * self.factor**2
        return nn.Sequential(
            PixelShuffle(grid, self.factor),
            nn.LayerNorm(wide),
            nn.Linear(wide, text_width),
            nn.GELU(),
            nn.Linear(text_width, text_width),
        )
