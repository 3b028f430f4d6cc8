"""Modules of the connectors that see a patch, or a block of patches, at a time."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


class PixelShuffle(nn.Module):
    """[tiles, rows * cols, C] and (rows, cols) -> [tiles, rows/f * cols/f, f² C].

    Output token (r, c) holds the patches (r f + i, c f + j) of its block, i slowest, then j, then channels: the order
    of InternVL and SAIL-VL2, so that their projector weights fit.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        (rows, cols), f = grid, self.factor
        tiles, _, width = features.shape
        blocks = features.reshape(tiles, rows // f, f, cols // f, f, width).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(tiles, (rows // f) * (cols // f), f * f * width)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Projector(nn.Sequential):
    """Layers one after the other; a pixel shuffle among them is told the grid."""

    def forward(  # type: ignore[override]
        self,
        features: torch.Tensor,
        grid: tuple[int, int],
        text: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        for layer in self:
            features = layer(features, grid) if isinstance(layer, PixelShuffle) else layer(features)
        return features


class GatedUnit(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x), without biases (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.down(nn.functional.silu(self.gate(x)) * self.up(x)))
