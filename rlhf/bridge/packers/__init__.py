"""Packers say which token ids stand for a picture: the single truth about placeholders. Needs no torch.

A new packer is one new module here: a frozen dataclass with a class attribute `type`, decorated `@PACKERS.register`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from rlhf.bridge.layout import Layout
from rlhf.bridge.slots import Slot


class Packer(Protocol):
    """What every packer offers."""

    type: ClassVar[str]

    def pattern(self, layout: Layout, tokens_per_tile: int, image_token_id: int) -> list[int]:
        """Token ids that replace the one placeholder of a picture. `image_token_id` must be their most frequent id:
        vLLM finds the placeholders of an expansion that way."""


PACKERS: Slot[Packer] = Slot("packer", __name__)
