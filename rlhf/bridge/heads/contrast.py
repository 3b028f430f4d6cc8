"""Flamingo's contrastive objective for its encoder (2204.14198, appendix B.1.1): a text encoder to compare pictures
with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.heads import HEADS
from rlhf.slots import at_least

if TYPE_CHECKING:
    from torch import nn


@HEADS.register
@dataclass(frozen=True)
class Contrast:
    """`width`, `heads`, `layers`, `feed`: of the text's transformer (published: BERT's base size, and its training) ·
    `length`: tokens of a caption that it reads at most · `space`: in how many dimensions pictures and captions are
    compared."""

    type: ClassVar[str] = "contrast"
    token_keys: ClassVar[tuple[str, ...]] = ()
    width: int = 768
    heads: int = 12
    layers: int = 12
    feed: int = 3072
    length: int = 64
    space: int = 1376

    def __post_init__(self) -> None:
        at_least("head.contrast", self, 1, ("width", "heads", "layers", "feed", "length", "space"))
        if self.width % self.heads:
            raise ValueError(f"head.contrast width {self.width} does not divide into {self.heads} heads")

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:  # noqa: ARG002
        width, feed = self.width, self.feed
        layer = 4 * (width**2 + width) + 2 * width * feed + feed + width + 4 * width
        return (vocabulary + self.length + 2) * width + self.layers * layer + (vision_width + width) * self.space + 1

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:  # noqa: ARG002
        from rlhf.bridge.layers.contrast import ContrastHead

        return ContrastHead(self, vision_width, vocabulary)
