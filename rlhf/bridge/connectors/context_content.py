"""LLaMA-VID (2311.17043): one token of what the question asks of a picture, and some of what the picture holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.connectors import CONNECTORS
from rlhf.bridge.connectors.qformer import QFormerConnector
from rlhf.slots import at_least

if TYPE_CHECKING:
    from torch import nn


@CONNECTORS.register
@dataclass(frozen=True)
class ContextContentConnector(QFormerConnector):
    """A Q-Former that reads the question makes the context token; `content`: the features averaged on a grid of so many
    by so many (1: the mean, for frames of a video), 0 for each by itself, through LLaVA-1.5's projection."""

    type: ClassVar[str] = "context_content"
    text_length: int = 64
    content: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("connector.context_content", self, 1, ("text_length",))
        at_least("connector.context_content", self, 0, ("content",))

    @property
    def reads_plane(self) -> bool:
        return self.content > 0

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        rows, cols = grid
        if self.content > min(rows, cols):
            raise ValueError(
                f"connector.context_content content = {self.content} is finer than a grid of {grid} patches"
            )
        return 1, 1 + (self.content**2 or rows * cols)

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:
        context = self.width * vision_width + vision_width + vision_width**2 + vision_width * text_width
        content = vision_width * text_width + text_width + text_width**2 + text_width
        return self.reader_parameters(vision_width, vocabulary) + context + text_width + vision_width + content

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:
        from rlhf.bridge.layers.context_content import ContextContent

        return ContextContent(self, vision_width, text_width, vocabulary)
