"""Flamingo's resampler (2204.14198, appendix A.1.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import gelu, pad, relu

from rlhf.bridge.layers.attention import attend

if TYPE_CHECKING:
    from rlhf.bridge.connectors.perceiver import PerceiverConnector


class Resample(nn.Module):
    """Latents z read the features and themselves: Attn(LN(z), [LN(x); LN(z)]), no biases."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.norm_latents(latents)
        key, value = self.to_kv(torch.cat((self.norm_media(media), latents), dim=-2)).chunk(2, dim=-1)
        found: torch.Tensor = self.to_out(attend(self.to_q(latents), key, value, self.heads))
        return found


class FeedForward(nn.Module):
    """W2 f(W1 LN(z)), no biases."""

    def __init__(self, width: int, multiplier: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, multiplier * width, bias=False)
        self.fc2 = nn.Linear(multiplier * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(self.norm(x))
        found: torch.Tensor = self.fc2(gelu(hidden) if self.activation == "gelu" else relu(hidden) ** 2)
        return found


class Perceiver(nn.Module):
    """[tiles, features, vision width] -> [tiles, latents, text width]."""

    def __init__(self, settings: PerceiverConnector, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(settings.latents, vision_width))
        self.attention = nn.ModuleList(
            Resample(vision_width, settings.heads, settings.head_dim) for _ in range(settings.depth)
        )
        self.feed_forward = nn.ModuleList(
            FeedForward(vision_width, settings.multiplier, settings.activation) for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, text_width) if settings.project else None
        self.missing = text_width - vision_width

    def forward(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],  # noqa: ARG002
        text: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        latents = self.latents.expand(len(features), -1, -1)
        for read, feed in zip(self.attention, self.feed_forward, strict=True):
            latents = latents + read(features, latents)
            latents = latents + feed(latents)
        found: torch.Tensor = self.norm(latents)
        return pad(found, (0, self.missing)) if self.projection is None else self.projection(found)
