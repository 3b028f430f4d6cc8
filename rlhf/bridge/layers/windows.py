"""Monkey (2311.06607, section 3.1): each window of the picture has low-rank updates of its own to a shared tower."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.bridge.layers.attention import attend


class LowRank(nn.Module):
    """s B A x with A, B and the scale s of each tile's window; 0 for a tile of window −1. B starts at 0 and s at 1."""

    def __init__(self, windows: int, width: int, out: int, rank: int) -> None:
        super().__init__()
        # parameters, not linear layers: transformers would give those a random start
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(windows, rank, width), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(windows, out, rank))
        self.scale = nn.Parameter(torch.ones(windows))

    def forward(self, x: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """x [tiles, patches, width] and windows [tiles] -> [tiles, patches, out]"""
        place = windows.clamp(min=0)
        found = x @ self.down[place].transpose(1, 2) @ self.up[place].transpose(1, 2)
        return found * (self.scale[place] * (windows >= 0))[:, None, None]


class Projections(nn.Module):
    """Those of an attention, under their names and without its forward: vLLM would fuse them, and updates could not
    come between."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.out_proj = attention.out_proj


class WindowedLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A layer of CLIP or SigLIP with updates to queries, keys and values, to the attention's output, and beside the
    feed-forward, which they do not pass."""

    def __init__(self, layer: Any, windows: int, attention_rank: int, mlp_rank: int) -> None:
        super().__init__()
        attention = layer.self_attn
        self.self_attn = Projections(attention)
        self.heads, self.scale = attention.num_heads, attention.scale
        self.layer_norm1, self.layer_norm2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        width = int(attention.embed_dim)
        self.window_in = LowRank(windows, width, 3 * width, attention_rank)
        self.window_out = LowRank(windows, width, width, attention_rank)
        self.window_mlp = LowRank(windows, width, width, mlp_rank)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,  # noqa: ARG002 - the tower passes it
        *,
        windows: torch.Tensor,
        **kwargs: Any,  # noqa: ARG002
    ) -> torch.Tensor:
        x = self.layer_norm1(hidden_states)
        updates = self.window_in(x, windows).chunk(3, dim=-1)
        own = self.self_attn
        projections = zip((own.q_proj, own.k_proj, own.v_proj), updates, strict=True)
        query, key, value = (project(x) + update for project, update in projections)
        found = attend(query, key, value, self.heads, scale=self.scale)
        hidden_states = hidden_states + own.out_proj(found) + self.window_out(found, windows)
        fed: torch.Tensor = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + fed + self.window_mlp(hidden_states, windows)
