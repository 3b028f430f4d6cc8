"""All features of a picture in one run, tile after tile (LLaVA, SAIL-VL2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlhf.bridge.layout import Layout
from rlhf.bridge.packers import PACKERS


@PACKERS.register
@dataclass(frozen=True)
class SegmentsPacker:
    """`wrap`: token ids set before and after each picture (SAIL-VL2's `<img>`, `</img>`). A recipe writes the tokens
    themselves, and `build` looks their ids up."""

    type: ClassVar[str] = "segments"
    wrap: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.wrap is None:
            return
        wrap = tuple(self.wrap)
        if len(wrap) != 2 or not all(isinstance(token, int) for token in wrap):
            raise ValueError(f"packer.segments wrap needs two token ids, got {self.wrap!r}")
        object.__setattr__(self, "wrap", wrap)

    def pattern(self, layout: Layout, tokens_per_tile: int, image_token_id: int) -> list[int]:
        placeholders = [image_token_id] * (layout.num_tiles * tokens_per_tile)
        if self.wrap is None:
            return placeholders
        return [self.wrap[0], *placeholders, self.wrap[1]]
