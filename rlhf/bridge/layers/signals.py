"""NExT-GPT's output projection (2309.05519, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from rlhf.bridge.heads.signals import Signals


class SignalHead(nn.Module):
    """States of signals [signals, tokens, text width], their tokens' embeddings added -> conditions [signals, length,
    out]: learned queries read them through a transformer, pre-norm, without dropout."""

    def __init__(self, settings: Signals, text_width: int) -> None:
        super().__init__()
        self.entry = nn.Linear(text_width, settings.width)
        self.queries = nn.Parameter(torch.randn(settings.length, settings.width))
        shape = settings.width, settings.heads, settings.feed
        form: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        reading = nn.TransformerEncoderLayer(*shape, **form)
        norms = nn.LayerNorm(settings.width), nn.LayerNorm(settings.width)
        self.encoder = nn.TransformerEncoder(reading, settings.layers, norms[0], enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*shape, **form), settings.layers, norms[1])
        self.exit = nn.Linear(settings.width, settings.out)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        asked = self.queries.expand(len(states), -1, -1)
        return cast(torch.Tensor, self.exit(self.decoder(asked, self.encoder(self.entry(states)))))
