"""Heads read the decoder's states of certain tokens and say something beside words. Importing this package needs no
torch. Engines hold a head's weights and never run it.

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

    def parameters(self, text_width: int) -> int:
        """How many the module has."""

    def build(self, text_width: int) -> nn.Module:
        """A module: states of its tokens [signals, tokens, text_width] -> what it says of each signal."""


HEADS: Slot[Head] = Slot("head", __name__)
