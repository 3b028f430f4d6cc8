"""LLaVA-NeXT: the tiles' features as one map of the picture, without what only shows padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.layout import Layout
from rlhf.bridge.packers import PACKERS, Grids
from rlhf.slots import token_pair

if TYPE_CHECKING:
    from torch import nn


def unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a map of `grid` = (rows, cols) features that show a picture of `size` = (width, height) laid
    centred on it, its aspect kept (transformers' rounding; LLaVA's own code differs by one row of features in
    places)."""
    (width, height), (rows, cols) = size, grid
    if width / height > cols / rows:
        left_out = (rows - int(round(height * (cols / width), 7))) // 2
        return slice(left_out, rows - left_out), slice(0, cols)
    left_out = (cols - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(left_out, cols - left_out)


@PACKERS.register
@dataclass(frozen=True)
class FeatureMapPacker:
    """The overview's features, then the map row by row, each row closed by a learned vector; without local tiles the
    overview's, closed once. For a grid tiler with overview = "first" and fit = "pad". `wrap`: tokens set before and
    after each picture."""

    type: ClassVar[str] = "feature_map"
    token_keys: ClassVar[tuple[str, ...]] = ("wrap",)
    wrap: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "wrap", token_pair("packer.feature_map wrap", self.wrap))

    @property
    def plain(self) -> bool:
        return False

    @property
    def reads_plane(self) -> bool:
        return True

    def pattern(self, layout: Layout, grids: Grids, image_token_id: int) -> list[int]:
        rows, cols = self.shown(layout, grids)
        overview = sum(r * c for tile, (r, c) in zip(layout.tiles, grids, strict=True) if tile.role == "global")
        found = [image_token_id] * (overview + (rows.stop - rows.start) * (cols.stop - cols.start + 1))
        return found if self.wrap is None else [self.wrap[0], *found, self.wrap[1]]

    def shown(self, layout: Layout, grids: Grids) -> tuple[slice, slice]:
        """Rows and columns of the map that are kept; of a picture without local tiles none but one closing vector."""
        local = [grid for tile, grid in zip(layout.tiles, grids, strict=True) if tile.role == "local"]
        if not local:
            return slice(0, 1), slice(0, 0)
        return unpadded(layout.size, (layout.grid[0] * local[0][0], layout.grid[1] * local[0][1]))

    def placing(self, count: int) -> tuple[list[int], list[bool]]:
        return [1] * count, [True] * count

    def parameters(self, text_width: int) -> int:
        return text_width

    def build(self, text_width: int) -> nn.Module:
        from rlhf.bridge.layers.packing import FeatureMap

        return FeatureMap(text_width, self.shown)
