"""A grid of equal tiles, cut from the picture laid on a canvas, and an overview (InternVL, SAIL-VL2, LLaVA-NeXT,
Monkey)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.layout import Layout, in_grid
from rlhf.bridge.raster import FITS, GREY, Colour, cut, fit
from rlhf.bridge.tilers import TILERS
from rlhf.slots import colour, one_of, pair

if TYPE_CHECKING:
    from PIL import Image

OVERVIEWS = ("last", "first", "none")


def closest_ratio(width: int, height: int, box: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """(rows, cols) with rows * cols <= max_tiles whose canvas has the aspect ratio nearest to the picture's.

    Among equals the larger grid wins while the picture covers more than half of its canvas, so that a small picture
    is not blown up. The rule is that of InternVL and SAIL-VL2 (`get_optimal_tiled_canvas` in transformers).
    """
    grids = [(rows, cols) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    best, best_gap = (1, 1), float("inf")
    for rows, cols in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        gap = abs(width / height - (cols * box[1]) / (rows * box[0]))
        roomy = width * height > 0.5 * rows * cols * box[0] * box[1]
        if gap < best_gap or (gap == best_gap and roomy):
            best, best_gap = (rows, cols), gap
    return best


def most_effective(width: int, height: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas (height, width) on which most pixels of the picture survive, its aspect kept; of equals the one that
    wastes least, then the first (LLaVA-NeXT; `select_best_resolution` in transformers)."""

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(canvases, key=merit)


@TILERS.register
@dataclass(frozen=True)
class GridTiler:
    """`tile`: (height, width) of a tile, an int for a square · either `max_tiles`: the grid of at most so many local
    tiles whose aspect ratio is closest, or `grids`: of these (rows, cols) the one whose canvas keeps most pixels; a
    single one is a fixed grid (Monkey) · `overview`: where the whole picture goes when there is more than one tile ·
    `fit`: how the picture fills its canvas · `fit_overview`: how its overview (LLaVA-NeXT pads the one and stretches
    the other) · `padding`: the colour that pads."""

    type: ClassVar[str] = "grid"
    tile: tuple[int, int]
    max_tiles: int | None = None
    grids: tuple[tuple[int, int], ...] | None = None
    overview: str = "last"
    fit: str = "stretch"
    fit_overview: str | None = None
    padding: Colour = GREY

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", pair("tiler.grid tile", self.tile))
        object.__setattr__(self, "padding", colour("tiler.grid padding", self.padding))
        one_of("tiler.grid overview", self.overview, OVERVIEWS)
        one_of("tiler.grid fit", self.fit, FITS)
        if self.fit_overview is not None:
            one_of("tiler.grid fit_overview", self.fit_overview, FITS)
        if (self.max_tiles is None) == (self.grids is None):
            raise ValueError("tiler.grid needs either 'max_tiles' or 'grids', not both or none")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"tiler.grid max_tiles must be at least 1, got {self.max_tiles}")
        if self.grids is not None:
            object.__setattr__(self, "grids", tuple(pair("tiler.grid grids", grid) for grid in self.grids))
            if not self.grids:
                raise ValueError("tiler.grid grids is empty: give at least one [rows, cols]")

    @property
    def cell(self) -> tuple[int, int]:
        return self.tile

    @property
    def extremes(self) -> tuple[tuple[int, int], ...]:
        high, wide = self.tile
        if self.grids is not None:
            by_area = sorted(self.grids, key=lambda grid: grid[0] * grid[1])
            return tuple((cols * wide, rows * high) for rows, cols in by_area)
        assert self.max_tiles is not None
        return (wide, high), (wide * self.max_tiles, high)

    def layout(self, width: int, height: int) -> Layout:
        if self.grids is None:
            assert self.max_tiles is not None
            grid = closest_ratio(width, height, self.tile, self.max_tiles)
        else:
            high, wide = self.tile
            canvas = most_effective(width, height, [(rows * high, cols * wide) for rows, cols in self.grids])
            grid = canvas[0] // high, canvas[1] // wide
        return Layout(size=(width, height), grid=grid, tiles=in_grid(grid, self.tile, self.overview, self.tile))

    def apply(self, image: Image.Image, layout: Layout) -> list[Image.Image]:
        (rows, cols), (high, wide) = layout.grid, self.tile
        canvas = fit(image, (rows * high, cols * wide), self.fit, self.padding)
        whole = self.fit_overview or self.fit
        return [
            fit(image, self.tile, whole, self.padding) if tile.role == "global" else cut(canvas, tile)
            for tile in layout.tiles
        ]
