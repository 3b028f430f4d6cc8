"""A tile's patches as they are."""

from __future__ import annotations

import torch
from torch import nn


class Patches(nn.Module):
    """Normalised pixels [tiles, 3, height, width] -> [tiles, rows * cols, patch height * patch width * 3]."""

    def __init__(self, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, pixel_values: torch.Tensor, windows: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        tiles, channels, height, width = pixel_values.shape
        high, wide = self.patch
        parts = pixel_values.reshape(tiles, channels, height // high, high, width // wide, wide)
        return parts.permute(0, 2, 4, 3, 5, 1).reshape(tiles, -1, high * wide * channels)

    def extra_repr(self) -> str:
        return f"patch={self.patch}"
