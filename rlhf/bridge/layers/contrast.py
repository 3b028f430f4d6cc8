"""Pictures and captions in one space (Flamingo 2204.14198, appendix B.1.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from rlhf.bridge.heads.contrast import Contrast


class ContrastHead(nn.Module):
    """Mean features of a picture and mean states of a caption, projected to unit vectors. Without dropout."""

    def __init__(self, settings: Contrast, vision_width: int, vocabulary: int) -> None:
        super().__init__()
        width, form = settings.width, dict[str, Any](dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(settings.length, width)
        layer = nn.TransformerEncoderLayer(width, settings.heads, settings.feed, **form)
        self.encoder = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.vision = nn.Linear(vision_width, settings.space, bias=False)
        self.text = nn.Linear(width, settings.space, bias=False)
        self.inverse_temperature = nn.Parameter(torch.full((1,), 1 / 0.07))

    def forward(self, features: torch.Tensor, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [pairs, features, vision width] and captions [pairs, length], -1 after their end -> unit vectors
        [pairs, space] of both."""
        captions = captions[:, : self.places.num_embeddings]
        said = captions >= 0
        read = self.words(captions.clamp(min=0)) + self.places.weight[: captions.shape[1]]
        states = self.encoder(read, src_key_padding_mask=~said)
        meant = (states * said[..., None]).sum(1) / said.sum(1, keepdim=True).clamp(min=1)
        return normalize(self.vision(features.mean(1)), dim=-1), normalize(self.text(meant), dim=-1)
