"""NExT-GPT (2309.05519, section 3.3): tokens that end an answer become the condition of an image generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.heads import HEADS
from rlhf.slots import at_least, token_id

if TYPE_CHECKING:
    from torch import nn


@HEADS.register
@dataclass(frozen=True)
class Signals:
    """`tokens`: what a signal is spelt with, in order (a recipe writes tokens) · `width`, `heads`, `layers`, `feed`: of
    a transformer between their states and the condition · `length`, `out`: the condition's, those of the generator's
    text encoder (Stable Diffusion: 77 x 768) · `encoder`: the folder or hub name of that encoder, a CLIP text model, to
    whose embedding of a caption a signal is aligned; "" for one of random weights, to try it."""

    type: ClassVar[str] = "signals"
    token_keys: ClassVar[tuple[str, ...]] = ("tokens",)
    tokens: tuple[int, ...]
    width: int = 512
    heads: int = 4
    layers: int = 4
    feed: int = 2048
    length: int = 77
    out: int = 768
    encoder: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        at_least("head.signals", self, 1, ("width", "heads", "layers", "feed", "length", "out"))
        if not self.tokens:
            raise ValueError("head.signals tokens is empty: name the tokens that a signal is spelt with")
        for token in self.tokens:
            token_id("head.signals tokens", token)
        if self.width % self.heads:
            raise ValueError(f"head.signals width {self.width} does not divide into {self.heads} heads")

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:  # noqa: ARG002
        width, feed = self.width, self.feed
        attention, norm = 4 * (width**2 + width), 2 * width
        feeding = 2 * width * feed + feed + width
        encoder = self.layers * (attention + feeding + 2 * norm) + norm
        decoder = self.layers * (2 * attention + feeding + 3 * norm) + norm
        ends = (text_width + 1) * width + self.length * width + (width + 1) * self.out
        return encoder + decoder + ends

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:  # noqa: ARG002
        from rlhf.bridge.layers.signals import SignalHead

        return SignalHead(self, text_width)
