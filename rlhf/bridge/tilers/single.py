"""One picture, one tile (Flamingo, BLIP-2, LLaVA, Qwen-VL, CogVLM and most others)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.layout import Layout, Tile
from rlhf.bridge.raster import FITS, GREY, Colour, fit
from rlhf.bridge.tilers import TILERS
from rlhf.slots import colour, one_of, pair

if TYPE_CHECKING:
    from PIL import Image


@TILERS.register
@dataclass(frozen=True)
class SingleTiler:
    """`size`: (height, width) in pixels, an int for a square · `fit`: stretch, pad or crop · `padding`: the colour that
    pads (LLaVA-1.5: the mean of CLIP's pictures)."""

    type: ClassVar[str] = "single"
    size: tuple[int, int]
    fit: str = "stretch"
    padding: Colour = GREY

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", pair("tiler.single size", self.size))
        object.__setattr__(self, "padding", colour("tiler.single padding", self.padding))
        one_of("tiler.single fit", self.fit, FITS)

    @property
    def cell(self) -> tuple[int, int]:
        return self.size

    @property
    def extremes(self) -> tuple[tuple[int, int], ...]:
        return ((self.size[1], self.size[0]),)

    def layout(self, width: int, height: int) -> Layout:
        return Layout(size=(width, height), grid=(1, 1), tiles=(Tile("global", self.size),))

    def apply(self, image: Image.Image, layout: Layout) -> list[Image.Image]:  # noqa: ARG002 - always one tile
        return [fit(image, self.size, self.fit, self.padding)]
