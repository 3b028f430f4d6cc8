"""Projections that see one patch, or one small block of patches, at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.connectors import CONNECTORS, Plain
from rlhf.slots import one_of

if TYPE_CHECKING:
    from torch import nn

KINDS = ("linear", "mlp2x_gelu", "mlp2x_gelu_norm", "pixel_shuffle_mlp", "glu", "neck")
HIDDEN = ("glu", "neck")


@CONNECTORS.register
@dataclass(frozen=True)
class MLPConnector(Plain):
    """linear: LLaVA (2304.08485), Fuyu · mlp2x_gelu: LLaVA-1.5 (2310.03744) · mlp2x_gelu_norm: Yi-VL (2403.04652), a
    LayerNorm after each linear layer · pixel_shuffle_mlp: SAIL-VL2 (2509.14033) and InternVL, factor x factor patches
    -> LayerNorm(factor² C) -> Linear -> GELU -> Linear · glu: CogVLM (2311.03079), a linear layer, LayerNorm and GELU,
    then a gated unit as wide as `hidden` (the decoder's feed-forward), no biases · neck: LaVIN (2305.15023), through
    `hidden` numbers and SiLU. `factor` is for pixel_shuffle_mlp, `hidden` for glu and neck."""

    type: ClassVar[str] = "mlp"
    kind: str = "mlp2x_gelu"
    factor: int = 2
    hidden: int | None = None

    def __post_init__(self) -> None:
        one_of("connector.mlp kind", self.kind, KINDS)
        if self.factor < 1:
            raise ValueError(f"connector.mlp factor must be at least 1, got {self.factor}")
        if (self.kind in HIDDEN) != (self.hidden is not None):
            raise ValueError(f"connector.mlp hidden is for the kinds {' and '.join(HIDDEN)}, which need it")

    @property
    def keeps_plane(self) -> bool:
        return True

    @property
    def reads_plane(self) -> bool:
        return self.kind == "pixel_shuffle_mlp"

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, cols = grid
        if self.kind != "pixel_shuffle_mlp":
            return grid
        if rows % self.factor or cols % self.factor:
            raise ValueError(f"a grid of {grid} patches does not divide by connector.mlp factor {self.factor}")
        return rows // self.factor, cols // self.factor

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:  # noqa: ARG002
        hidden, text = self.hidden or 0, text_width
        wide = vision_width * self.factor**2 if self.kind == "pixel_shuffle_mlp" else vision_width
        first = wide * text + text
        return {
            "linear": first,
            "mlp2x_gelu": first + text * text + text,
            "mlp2x_gelu_norm": first + text * text + text + 4 * text,
            "pixel_shuffle_mlp": 2 * wide + first + text * text + text,
            "glu": wide * text + 2 * text + 3 * text * hidden,
            "neck": wide * hidden + hidden + hidden * text + text,
        }[self.kind]

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:  # noqa: ARG002
        from torch import nn

        from rlhf.bridge.layers.mlp import GatedUnit, PixelShuffle, Projector

        text, linear = text_width, nn.Linear
        if self.kind == "linear":
            return Projector(linear(vision_width, text))
        if self.kind == "mlp2x_gelu":
            return Projector(linear(vision_width, text), nn.GELU(), linear(text, text))
        if self.kind == "mlp2x_gelu_norm":
            norms = nn.LayerNorm(text), nn.LayerNorm(text)
            return Projector(linear(vision_width, text), norms[0], nn.GELU(), linear(text, text), norms[1])
        if self.kind == "glu":
            assert self.hidden is not None
            first = linear(vision_width, text, bias=False)
            return Projector(first, nn.LayerNorm(text), nn.GELU(), GatedUnit(text, self.hidden))
        if self.kind == "neck":
            assert self.hidden is not None
            return Projector(linear(vision_width, self.hidden), nn.SiLU(), linear(self.hidden, text))
        wide = vision_width * self.factor**2
        norm = nn.LayerNorm(wide)
        return Projector(PixelShuffle(self.factor), norm, linear(wide, text), nn.GELU(), linear(text, text))
