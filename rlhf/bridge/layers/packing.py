"""What packers do with features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rlhf.bridge.layout import Layout
from rlhf.bridge.packers import Grids


class Segments(nn.Module):
    """Tile after tile, between two vectors where `edges` says so."""

    def __init__(self, width: int, edges: str) -> None:
        super().__init__()
        self.zeros = edges == "zeros"
        self.edges = nn.Parameter(torch.randn(2, width) * width**-0.5) if edges == "learned" else None

    def forward(self, layout: Layout, grids: Grids, features: Sequence[torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        found = torch.cat(list(features))
        if self.edges is not None:
            return torch.cat((self.edges[:1].to(found), found, self.edges[1:].to(found)))
        if self.zeros:
            return nn.functional.pad(found, (0, 0, 1, 1))
        return found


class FeatureMap(nn.Module):
    """Overview, then the kept rows of the map, each closed by a learned vector (LLaVA-NeXT's image_newline)."""

    def __init__(self, width: int, shown: Callable[[Layout, Grids], tuple[slice, slice]]) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self._shown = shown

    def forward(self, layout: Layout, grids: Grids, features: Sequence[torch.Tensor]) -> torch.Tensor:
        tiles = list(zip(layout.tiles, grids, features, strict=True))
        overview = [found for tile, _, found in tiles if tile.role == "global"]
        local = {(tile.row, tile.col): found.unflatten(0, grid) for tile, grid, found in tiles if tile.role == "local"}
        newline = self.newline.to(features[0])
        if not local:
            return torch.cat((*overview, newline[None]))
        rows, cols = layout.grid
        whole = torch.cat([torch.cat([local[row, col] for col in range(cols)], dim=1) for row in range(rows)])
        kept = whole[self._shown(layout, grids)]
        closed = torch.cat((kept, newline.expand(len(kept), 1, -1)), dim=1)
        return torch.cat((*overview, closed.flatten(0, 1)))
