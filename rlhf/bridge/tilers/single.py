"""One picture, one tile (Flamingo, BLIP-2, LLaVA, Qwen-VL, CogVLM and most others)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.layout import Layout, Tile
from rlhf.bridge.raster import FITS, fit, to_tensor
from rlhf.bridge.slots import one_of, pair
from rlhf.bridge.tilers import TILERS

if TYPE_CHECKING:
    import torch
    from PIL import Image


@TILERS.register
@dataclass(frozen=True)
class SingleTiler:
    """`size`: (height, width) in pixels, an int for a square · `fit`: stretch, pad or crop."""

    type: ClassVar[str] = "single"
    size: tuple[int, int]
    fit: str = "stretch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", pair("tiler.single size", self.size))
        one_of("tiler.single fit", self.fit, FITS)

    @property
    def box(self) -> tuple[int, int]:
        return self.size

    @property
    def most_tiles(self) -> int:
        return 1

    def layout(self, width: int, height: int) -> Layout:
        return Layout(size=(width, height), grid=(1, 1), tiles=(Tile("global"),))

    def apply(self, image: Image.Image, layout: Layout) -> torch.Tensor:  # noqa: ARG002 - always one tile
        return to_tensor([fit(image, self.size, self.fit)])
