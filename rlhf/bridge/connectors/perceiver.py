"""Flamingo's resampler (2204.14198): a fixed number of latents read the picture's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.connectors import CONNECTORS, Plain
from rlhf.slots import at_least, one_of

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS = ("gelu", "relu2")


@CONNECTORS.register
@dataclass(frozen=True)
class PerceiverConnector(Plain):
    """`latents`: tokens a tile becomes · `depth`, `heads`, `head_dim`, `multiplier` (of the feed-forward's width):
    its layers, as wide as the features · `activation`: gelu (OpenFlamingo) or the paper's squared relu · `project`: a
    linear layer into the decoder's width; without it latents are filled up with zeros, for cross-attention layers that
    have projections of their own (Flamingo)."""

    type: ClassVar[str] = "perceiver"
    latents: int = 64
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    multiplier: int = 4
    activation: str = "gelu"
    project: bool = True

    def __post_init__(self) -> None:
        at_least("connector.perceiver", self, 1, ("latents", "depth", "heads", "head_dim", "multiplier"))
        one_of("connector.perceiver activation", self.activation, ACTIVATIONS)

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:  # noqa: ARG002 - as many tokens of any
        return 1, self.latents

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:  # noqa: ARG002
        width, inner = vision_width, self.heads * self.head_dim
        layer = 3 * 2 * width + 4 * width * inner + 2 * self.multiplier * width**2
        projection = width * text_width + text_width if self.project else 0
        return self.latents * width + self.depth * layer + 2 * width + projection

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:  # noqa: ARG002
        from rlhf.bridge.layers.perceiver import Perceiver

        if not self.project and vision_width > text_width:
            raise ValueError(
                f"connector.perceiver: features of width {vision_width} do not fit the decoder's {text_width} without "
                "`project = true`"
            )
        return Perceiver(self, vision_width, text_width)
