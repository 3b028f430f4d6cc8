"""Qwen-VL's resampler: attn(LN(q) + p, LN(x W) + p', LN(x W)), positions on queries and keys only."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import interpolate

from rlhf.bridge.layers.attention import attend


def sine_positions(side: int, width: int) -> torch.Tensor:
    """[side², width] fixed 2-D positions: the first half of the width from the column, the second from the row, each
    sines then cosines of position / 10000^(2i / (width / 2))."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, width / 2]
    cols = line[None].expand(side, side, -1)
    rows = line[:, None].expand(side, side, -1)
    return torch.cat((cols, rows), dim=-1).flatten(0, 1).float()


class Resampler(nn.Module):
    """[tiles, rows * cols, vision width] and (rows, cols) -> [tiles, side², text width]."""

    positions: torch.Tensor

    def __init__(self, side: int, heads: int, post: bool, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.side, self.heads = side, heads
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(side**2, text_width), std=0.02))
        self.register_buffer("positions", sine_positions(side, text_width), persistent=False)
        self.width = text_width
        self.kv = nn.Linear(vision_width, text_width, bias=False)
        self.norm_query = nn.LayerNorm(text_width, eps=1e-6)
        self.norm_kv = nn.LayerNorm(text_width, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(text_width, text_width) for _ in range(4))
        self.norm_post = nn.LayerNorm(text_width, eps=1e-6) if post else None
        self.projection = nn.Linear(text_width, text_width, bias=False) if post else None

    def constants(self) -> dict[str, torch.Tensor]:
        """Buffers that no file holds."""
        return {"positions": sine_positions(self.side, self.width)}

    def _key_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """[rows * cols, width]: the table of the queries, resized."""
        if grid == (self.side, self.side):
            return self.positions
        table = self.positions.view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        found = interpolate(table.float(), size=grid, mode="bicubic", align_corners=False)
        return found.permute(0, 2, 3, 1).flatten(0, 2).to(self.positions.dtype)

    def forward(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],
        text: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        value = self.norm_kv(self.kv(features))
        key = self.to_k(value + self._key_positions(grid).to(value.dtype))
        asking = self.to_q(self.norm_query(self.query) + self.positions.to(value.dtype)).expand(len(features), -1, -1)
        found: torch.Tensor = self.to_out(attend(asking, key, self.to_v(value), self.heads))
        if self.norm_post is not None and self.projection is not None:
            found = self.projection(self.norm_post(found))
        return found
