"""Heads make of a bridge's states something beside words, in training alone: engines hold a head's weights and never
run it. Importing this package needs no torch.

A new head is one new module here: a frozen dataclass with a class attribute `type`, decorated `@HEADS.register`. Its
torch module lives in `rlhf/bridge/layers` and is imported in `build`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from rlhf.slots import Slot

if TYPE_CHECKING:
    from torch import nn


class Head(Protocol):
    """What every head offers."""

    type: ClassVar[str]
    token_keys: ClassVar[tuple[str, ...]]  # settings that are token ids; recipes write the tokens themselves

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:
        """How many the module has."""

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:
        """A module between features of `vision_width`, states of `text_width` and a vocabulary."""


HEADS: Slot[Head] = Slot("head", __name__)
