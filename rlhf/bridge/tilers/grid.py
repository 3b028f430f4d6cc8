"""A grid of tiles and an overview (InternVL, SAIL-VL2: closest aspect ratio, thumbnail last)."""

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

POLICIES = ("closest_ratio",)
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


@TILERS.register
@dataclass(frozen=True)
class GridTiler:
    """`tile`: (height, width) of a tile, an int for a square · `max_tiles`: most local tiles, the overview not counted
    · `overview`: where the whole picture goes when there is more than one tile · `fit`: how it fills its canvas."""

    type: ClassVar[str] = "grid"
    tile: tuple[int, int]
    max_tiles: int
    policy: str = "closest_ratio"
    overview: str = "last"
    fit: str = "stretch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", pair("tiler.grid tile", self.tile))
        one_of("tiler.grid policy", self.policy, POLICIES)
        one_of("tiler.grid overview", self.overview, OVERVIEWS)
        one_of("tiler.grid fit", self.fit, FITS)
        if self.max_tiles < 1:
            raise ValueError(f"tiler.grid max_tiles must be at least 1, got {self.max_tiles}")

    @property
    def box(self) -> tuple[int, int]:
        return self.tile

    @property
    def most_tiles(self) -> int:
        return self.max_tiles + (self.overview != "none" and self.max_tiles > 1)

    def layout(self, width: int, height: int) -> Layout:
        rows, cols = closest_ratio(width, height, self.tile, self.max_tiles)
        tiles = tuple(Tile("local", row, col) for row in range(rows) for col in range(cols))
        if len(tiles) > 1 and self.overview == "last":
            tiles = (*tiles, Tile("global"))
        if len(tiles) > 1 and self.overview == "first":
            tiles = (Tile("global"), *tiles)
        return Layout(size=(width, height), grid=(rows, cols), tiles=tiles)

    def apply(self, image: Image.Image, layout: Layout) -> torch.Tensor:
        (rows, cols), (high, wide) = layout.grid, self.tile
        canvas = fit(image, (rows * high, cols * wide), self.fit)
        cells = {
            (row, col): canvas.crop((col * wide, row * high, (col + 1) * wide, (row + 1) * high))
            for row in range(rows)
            for col in range(cols)
        }
        return to_tensor(
            [
                fit(image, self.tile, self.fit) if tile.role == "global" else cells[tile.row, tile.col]
                for tile in layout.tiles
            ]
        )
