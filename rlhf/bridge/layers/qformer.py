"""The Q-Former (2301.12597, section 3.1): BERT's layers, post-norm, with cross-attention for queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import gelu

from rlhf.bridge.layers.attention import attend

if TYPE_CHECKING:
    from rlhf.bridge.connectors.qformer import QFormerConnector

EPS = 1e-12  # BERT's


class Attention(nn.Module):
    """LN(x + W_o Attn(x, states)); `states` are as wide as source_width."""

    def __init__(self, width: int, heads: int, source_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = attend(self.query(x), self.key(states), self.value(states), self.heads, mask)
        normed: torch.Tensor = self.norm(self.out(found) + x)
        return normed


class Feed(nn.Module):
    """LN(x + W2 gelu(W1 x))."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, intermediate)
        self.down = nn.Linear(intermediate, width)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.down(gelu(self.up(x))) + x)
        return found


class Layer(nn.Module):
    """Self-attention over queries and, if there are any, text; cross-attention and a feed-forward of their own for
    queries."""

    def __init__(self, settings: QFormerConnector, source_width: int, crossing: bool, text: bool) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.attention = Attention(width, heads, width)
        self.crossing = Attention(width, heads, source_width) if crossing else None
        self.feed_query = Feed(width, settings.intermediate)
        self.feed_text = Feed(width, settings.intermediate) if text else None

    def forward(
        self, x: torch.Tensor, source: torch.Tensor, queries: int, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.attention(x, x, mask)
        asking, text = x[:, :queries], x[:, queries:]
        if self.crossing is not None:
            asking = self.crossing(asking, source)
        asking = self.feed_query(asking)
        if self.feed_text is None:
            return asking
        return torch.cat((asking, self.feed_text(text)), dim=1)


class QFormer(nn.Module):
    """Embeddings [tiles, queries + text, width] and features [tiles, features, source_width] -> [tiles, queries + text,
    width]. The first `text_layers` have a feed-forward for text; after the last of them text is left out. `mask` [tiles
    or 1, 1, queries + text or 1, queries + text] is True where one may look."""

    def __init__(self, settings: QFormerConnector, source_width: int, text_layers: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.width, eps=EPS)
        self.layers = nn.ModuleList(
            Layer(settings, source_width, index % settings.cross_every == 0, index < text_layers)
            for index in range(settings.layers)
        )

    def forward(
        self, x: torch.Tensor, source: torch.Tensor, queries: int, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, source, queries, mask if mask is None else mask[..., : x.shape[1]])
        return x


class Heads(nn.Module):
    """What BLIP-2's first stage asks of queries and text: where both lie in one space, whether they match, and the next
    word."""

    def __init__(self, width: int, space: int, vocabulary: int) -> None:
        super().__init__()
        self.starts = nn.Parameter(torch.randn(2, width) * 0.02)  # begin a text to be compared, and one to be told
        self.vision = nn.Linear(width, space)
        self.text = nn.Linear(width, space)
        self.match = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.full((1,), 0.07))
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def words(self, states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of the next word from states [..., width] and the table of words."""
        return self.norm(gelu(self.transform(states))) @ table.T + self.bias


class Reader(nn.Module):
    """Queries that read a picture and, where text_length is above 0, a question: features [tiles, features, vision
    width] and text [tiles, text_length], -1 where there is no token -> [tiles, queries, width]."""

    def __init__(self, settings: QFormerConnector, vision_width: int, vocabulary: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(settings.queries, settings.width) * 0.02)
        self.norm_vision = nn.LayerNorm(vision_width) if settings.norm else None
        self.words = nn.Embedding(vocabulary, settings.width) if settings.text_length else None
        self.places = nn.Embedding(settings.text_length, settings.width) if settings.text_length else None
        self.qformer = QFormer(settings, vision_width, settings.text_layers)
        self.heads = Heads(settings.width, settings.aligned, vocabulary) if settings.aligned else None

    def forward(self, features: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        source = features if self.norm_vision is None else self.norm_vision(features)
        asked = self.queries.expand(len(features), -1, -1)
        if self.words is None or self.places is None:
            found: torch.Tensor = self.qformer(asked, source, asked.shape[1])
            return found
        if text is None:
            raise ValueError("this connector reads the question: give `questions` [cells, text_length]")
        words = self.words(text.clamp(min=0)) + self.places.weight
        seen = torch.cat((torch.ones(asked.shape[:2], device=text.device, dtype=torch.bool), text >= 0), dim=1)
        both = torch.cat((asked, words.to(asked.dtype)), dim=1)
        found = self.qformer(both, source, asked.shape[1], seen[:, None, None])
        return found[:, : asked.shape[1]]


class QFormerBridge(nn.Module):
    """[tiles, features, vision width] -> [tiles, queries, text width]."""

    def __init__(self, settings: QFormerConnector, vision_width: int, text_width: int, vocabulary: int) -> None:
        super().__init__()
        self.reader = Reader(settings, vision_width, vocabulary)
        self.projection = nn.Linear(settings.width, text_width)

    def forward(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],  # noqa: ARG002
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found: torch.Tensor = self.projection(self.reader(features, text))
        return found
