"""One tile as large as the picture (Fuyu and OtterHD, 2311.04219; SAIL-VL2's AnyRes)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.layout import Layout, Tile
from rlhf.bridge.raster import Colour, fit, place
from rlhf.bridge.tilers import TILERS
from rlhf.slots import colour, one_of, pair

if TYPE_CHECKING:
    from PIL import Image

FUYU = (1, 1, 1)  # its padding value of 1.0 is on the scale of 0 to 255
LEAST_COLS = 2  # a row's end is one token: placeholders must outnumber it


@TILERS.register
@dataclass(frozen=True)
class NativeTiler:
    """`cell`: (height, width) of which the tile is a multiple · `max_size`: a larger picture is scaled down into it,
    its aspect kept · `fit`: "pad" on the right and at the bottom (Fuyu), or "stretch" to the nearest multiple
    (SAIL-VL2) · `padding`: the colour that pads."""

    type: ClassVar[str] = "native"
    cell: tuple[int, int]
    max_size: tuple[int, int]
    fit: str = "pad"
    padding: Colour = FUYU

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", pair("tiler.native cell", self.cell))
        object.__setattr__(self, "max_size", pair("tiler.native max_size", self.max_size))
        object.__setattr__(self, "padding", colour("tiler.native padding", self.padding))
        one_of("tiler.native fit", self.fit, ("pad", "stretch"))
        if self.max_size[0] < self.cell[0] or self.max_size[1] < LEAST_COLS * self.cell[1]:
            raise ValueError(
                f"tiler.native max_size {self.max_size} must hold one cell of {self.cell} by {LEAST_COLS} of them"
            )

    @property
    def extremes(self) -> tuple[tuple[int, int], ...]:
        (high, wide), (most_high, most_wide) = self.cell, self.max_size
        return (LEAST_COLS * wide, high), (most_wide, most_high)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) within max_size."""
        if height <= self.max_size[0] and width <= self.max_size[1]:
            return height, width
        scale = min(self.max_size[0] / height, self.max_size[1] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))

    def layout(self, width: int, height: int) -> Layout:
        sides = self._scaled(width, height)
        if self.fit == "pad":
            rows, cols = (math.ceil(side / cell) for side, cell in zip(sides, self.cell, strict=True))
        else:
            most = (side // cell for side, cell in zip(self.max_size, self.cell, strict=True))
            rows, cols = (min(round(s / c) or 1, m) for s, c, m in zip(sides, self.cell, most, strict=True))
        box = (rows * self.cell[0], max(cols, LEAST_COLS) * self.cell[1])
        return Layout(size=(width, height), grid=(1, 1), tiles=(Tile("global", box),))

    def apply(self, image: Image.Image, layout: Layout) -> list[Image.Image]:
        (box,) = (tile.box for tile in layout.tiles)
        if self.fit == "stretch":
            return [fit(image, box, "stretch")]
        return [place(image, self._scaled(*layout.size), box, (0, 0), self.padding)]
