"""Fold blocks of neighbouring patches into channels."""

from __future__ import annotations

import torch
from torch import nn


class PixelShuffle(nn.Module):
    """[tiles, rows * cols, C] -> [tiles, rows/f * cols/f, f² C].

    Output token (r, c) holds the patches (r f + i, c f + j) of its block, i slowest, then j, then channels: the order
    of InternVL and SAIL-VL2, so that their projector weights fit.
    """

    def __init__(self, grid: tuple[int, int], factor: int) -> None:
        super().__init__()
        self.grid = grid
        self.factor = factor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        (rows, cols), f = self.grid, self.factor
        tiles, _, width = features.shape
        blocks = features.reshape(tiles, rows // f, f, cols // f, f, width).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(tiles, (rows // f) * (cols // f), f * f * width)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, factor={self.factor}"
