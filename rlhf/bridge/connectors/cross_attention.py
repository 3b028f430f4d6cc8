"""One cross-attention layer from learned queries (Qwen-VL 2308.12966; LLaVA-UHD 2403.11703; Monkey 2311.06607)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.connectors import CONNECTORS, Plain
from rlhf.slots import at_least

if TYPE_CHECKING:
    from torch import nn


@CONNECTORS.register
@dataclass(frozen=True)
class CrossAttentionConnector(Plain):
    """`queries`: tokens a tile becomes, a square number: they stand on a grid, and queries and keys carry fixed 2-D
    sine positions, those of the keys resized to the tile's grid · `heads`: of the attention, as wide as the decoder
    (published: width / 128) · `post`: a norm and a square projection after it (Qwen-VL keeps them in its vision
    module)."""

    type: ClassVar[str] = "cross_attention"
    queries: int = 64
    heads: int = 8
    post: bool = True

    def __post_init__(self) -> None:
        at_least("connector.cross_attention", self, 1, ("queries", "heads"))
        if math.isqrt(self.queries) ** 2 != self.queries:
            raise ValueError(f"connector.cross_attention queries must be a square number, got {self.queries}")

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:  # noqa: ARG002 - as many tokens of any
        side = math.isqrt(self.queries)
        return side, side

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:  # noqa: ARG002
        attention = 4 * text_width**2 + 4 * text_width
        post = 2 * text_width + text_width**2 if self.post else 0
        return self.queries * text_width + vision_width * text_width + 4 * text_width + attention + post

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:  # noqa: ARG002
        from rlhf.bridge.layers.cross_attention import Resampler

        if text_width % (4 * self.heads):
            raise ValueError(
                f"connector.cross_attention: the decoder's width {text_width} does not divide by 4 x heads = "
                f"{4 * self.heads} (2-D positions need a quarter each)"
            )
        return Resampler(math.isqrt(self.queries), self.heads, self.post, vision_width, text_width)
