"""LLaMA-VID's context and content tokens (2311.17043, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention

from rlhf.bridge.layers.qformer import Reader

if TYPE_CHECKING:
    from rlhf.bridge.connectors.context_content import ContextContentConnector


class ContextContent(nn.Module):
    """[tiles, rows * cols, vision width] and the question -> [tiles, 1 + content, text width].

    context  W_v mean_q softmax(T (W_k X)ᵀ / √C) X, T the Q-Former's queries in the features' width C
    content  a two-layer projection of X, averaged on a grid
    """

    def __init__(self, settings: ContextContentConnector, vision_width: int, text_width: int, vocabulary: int) -> None:
        super().__init__()
        self.side = settings.content
        self.reader = Reader(settings, vision_width, vocabulary)
        self.asking = nn.Linear(settings.width, vision_width)
        self.key = nn.Linear(vision_width, vision_width)
        self.value = nn.Linear(vision_width, text_width)
        self.content = nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))

    def forward(self, features: torch.Tensor, grid: tuple[int, int], text: torch.Tensor | None = None) -> torch.Tensor:
        asked = self.asking(self.reader(features, text))
        context = self.value(scaled_dot_product_attention(asked, self.key(features), features).mean(1, keepdim=True))
        if self.side:
            plane = features.unflatten(1, grid).permute(0, 3, 1, 2)
            features = adaptive_avg_pool2d(plane, self.side).flatten(2).transpose(1, 2)
        return torch.cat((context, self.content(features)), dim=1)
