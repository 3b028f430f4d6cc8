"""BLIP-2's Q-Former (2301.12597), InstructBLIP's (2305.06500), which reads the question too, and InternLM-XComposer's
perceive sampler (2309.15112), BLIP-2's with 64 queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.connectors import CONNECTORS, Plain
from rlhf.slots import at_least

if TYPE_CHECKING:
    from torch import nn


@CONNECTORS.register
@dataclass(frozen=True)
class QFormerConnector(Plain):
    """A BERT whose queries see the picture by cross-attention in every `cross_every`-th layer, the first included ·
    `queries`: tokens a tile becomes · `layers`, `width`, `heads`, `intermediate`: BERT's (published: its base size) ·
    `text_length`: so many tokens of the question at most go through its self-attention beside the queries
    (InstructBLIP); 0 for none · `norm`: a LayerNorm of the vision features before it (BLIP-2's ln_vision) · `aligned`:
    above 0, heads for BLIP-2's first stage, whose contrast is in so many dimensions (published: 256), and text in the
    last layer too."""

    type: ClassVar[str] = "qformer"
    queries: int = 32
    layers: int = 12
    width: int = 768
    heads: int = 12
    intermediate: int = 3072
    cross_every: int = 2
    text_length: int = 0
    norm: bool = True
    aligned: int = 0

    def __post_init__(self) -> None:
        what = f"connector.{self.type}"
        at_least(what, self, 1, ("queries", "layers", "width", "heads", "intermediate", "cross_every"))
        at_least(what, self, 0, ("text_length", "aligned"))
        if self.aligned and self.text_length < 2:
            raise ValueError(f"{what} aligned compares pictures with their captions: give text_length, their longest")
        if self.width % self.heads:
            raise ValueError(f"{what} width {self.width} does not divide into {self.heads} heads")

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:  # noqa: ARG002 - as many tokens of any
        return 1, self.queries

    def reader_parameters(self, vision_width: int, vocabulary: int) -> int:
        """Of all but the projection into the decoder."""
        width, inner = self.width, self.intermediate
        attention = 4 * (width**2 + width) + 2 * width
        crossing = 2 * (width**2 + width) + 2 * (vision_width * width + width) + 2 * width
        feeding = 2 * width * inner + inner + width + 2 * width
        crossed = (self.layers + self.cross_every - 1) // self.cross_every
        stack = self.layers * (attention + feeding) + crossed * crossing
        ends = self.queries * width + 2 * width + (2 * vision_width if self.norm else 0)
        text = (vocabulary + self.text_length) * width + self.text_layers * feeding if self.text_length else 0
        heads = 2 * (width + 1) * self.aligned + 2 * (width + 1) + 1 + 2 * width + width**2 + 3 * width + vocabulary
        return stack + ends + text + (heads if self.aligned else 0)

    @property
    def text_layers(self) -> int:
        """Layers with a feed-forward for text: what it becomes in the last is read by nobody but the heads."""
        return self.layers if self.aligned else self.layers - 1 if self.text_length else 0

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:
        return self.reader_parameters(vision_width, vocabulary) + self.width * text_width + text_width

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:
        from rlhf.bridge.layers.qformer import QFormerBridge

        return QFormerBridge(self, vision_width, text_width, vocabulary)
