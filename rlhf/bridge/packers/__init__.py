"""Packers say which token ids stand for a picture, the single truth about placeholders, and bring its features into
their order. Importing this package needs no torch.

A new packer is one new module here: a frozen dataclass with a class attribute `type`, decorated `@PACKERS.register`.
Its torch module lives in `rlhf/bridge/layers` and is imported in `build`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from rlhf.bridge.layout import Layout
from rlhf.slots import Slot

if TYPE_CHECKING:
    from torch import nn

Grids = Sequence[tuple[int, int]]  # (rows, cols) of each tile's tokens, in the layout's order


class Packer(Protocol):
    """What every packer offers."""

    type: ClassVar[str]
    token_keys: ClassVar[tuple[str, ...]]  # settings that are token ids; recipes write the tokens themselves

    @property
    def plain(self) -> bool:
        """Whether a picture's features are those of its tiles, one after the other, and nothing else."""

    @property
    def reads_plane(self) -> bool:
        """Whether tokens must lie on the picture, its aspect kept."""

    def pattern(self, layout: Layout, grids: Grids, image_token_id: int) -> list[int]:
        """Token ids that replace the one placeholder of a picture. `image_token_id` must be their most frequent id:
        vLLM finds the placeholders of an expansion that way."""

    def placing(self, count: int) -> tuple[list[int], list[bool]]:
        """Of each of a picture's `count` placeholders, by how much it advances positions, and whether a decoder with
        layers for pictures takes it for a part of one."""

    def parameters(self, text_width: int) -> int:
        """How many the module has."""

    def build(self, text_width: int) -> nn.Module:
        """A module: layout, grids, and the features of each tile [tokens, text_width] -> [placeholders, text_width]."""


PACKERS: Slot[Packer] = Slot("packer", __name__)
