"""LLaVA-UHD (2403.11703): slices near the encoder's own size and aspect, each resized with its aspect kept, and an
overview likewise; tiles of one picture differ in shape from those of another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.layout import Layout, Tile, in_grid
from rlhf.bridge.raster import cut, fit
from rlhf.bridge.tilers import TILERS
from rlhf.slots import at_least, one_of

if TYPE_CHECKING:
    from PIL import Image

VARIANTS = ("eccv", "arxiv")


def slicing(width: int, height: int, side: int, max_slices: int, variant: str) -> tuple[int, int]:
    """(rows, cols) of slices. N = ⌈W H / side²⌉, at most `max_slices`; of the grids of N − 1, N and N + 1 slices the
    one whose slices are nearest to squares, |log(W / H) − log(cols / rows)|; of equals the one with more rows.

    eccv: a picture of N = 1 stays whole, and no grid has more than `max_slices` or exactly one. arxiv, the first
    version's code: one that is long enough is cut in two all the same, and `max_slices` + 1 are allowed."""
    number = min(math.ceil(width * height / side**2), max_slices)
    if variant == "eccv":
        counts = [n for n in (number - 1, number, number + 1) if 1 < n <= max_slices] if number > 1 else [1]
    else:
        counts = [n for n in (number - 1, number, number + 1) if n > 1 or (number <= 2 and n == number)]
    grids = [(rows, count // rows) for count in counts for rows in range(1, count + 1) if count % rows == 0]
    log_ratio = math.log(width / height)
    return min(grids, key=lambda grid: (abs(log_ratio - math.log(grid[1] / grid[0])), -grid[0]))


def shaped(ratio: float, side: int, patch: int) -> tuple[int, int]:
    """(height, width) of about side² pixels with aspect `ratio` = width / height, down to whole patches, at least one
    and at most (side / patch)² of them."""
    high = side / math.sqrt(ratio)
    rows = max(1, int(high) // patch)
    cols = max(1, int(int(high) * ratio) // patch)
    most = (side // patch) ** 2  # passed by extreme aspects only, whose shorter side is less than a patch
    return min(rows, most // min(cols, most)) * patch, min(cols, most) * patch


@TILERS.register
@dataclass(frozen=True)
class SlicesTiler:
    """`tile`: side of the square that a slice's area approaches (LLaVA-UHD: 336) · `patch`: slices are whole patches ·
    `max_slices`: at most so many, the overview not counted · `variant`: which of the two published rules."""

    type: ClassVar[str] = "slices"
    tile: int
    patch: int
    max_slices: int = 6
    variant: str = "eccv"

    def __post_init__(self) -> None:
        one_of("tiler.slices variant", self.variant, VARIANTS)
        at_least("tiler.slices", self, 1, ("tile", "patch", "max_slices"))
        if self.tile < self.patch:
            raise ValueError(f"tiler.slices: tile = {self.tile} must hold a patch = {self.patch}")

    @property
    def cell(self) -> tuple[int, int]:
        return self.patch, self.patch

    @property
    def extremes(self) -> tuple[tuple[int, int], ...]:
        side, most = self.tile, self.max_slices + (self.variant == "arxiv")
        thin = (side**2, 1), (1, side**2)  # slices one patch high, or wide
        return ((side, side), *thin, *((side * cols, side * (most // cols)) for cols in range(1, most + 1)))

    def layout(self, width: int, height: int) -> Layout:
        grid = slicing(width, height, self.tile, self.max_slices, self.variant)
        whole = shaped(width / height, self.tile, self.patch)
        if grid == (1, 1):
            return Layout(size=(width, height), grid=grid, tiles=(Tile("global", whole),))
        box = shaped(max(1, width // grid[1]) / max(1, height // grid[0]), self.tile, self.patch)
        return Layout(size=(width, height), grid=grid, tiles=in_grid(grid, box, "last", whole))

    def apply(self, image: Image.Image, layout: Layout) -> list[Image.Image]:
        (rows, cols), (high, wide) = layout.grid, layout.tiles[0].box
        canvas = fit(image, (rows * high, cols * wide), "stretch")
        return [
            fit(image, tile.box, "stretch") if tile.role == "global" else cut(canvas, tile) for tile in layout.tiles
        ]
