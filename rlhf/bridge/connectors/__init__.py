"""Connectors project features into the decoder's width. Importing this package needs no torch.

A new connector is one new module here: a frozen dataclass with a class attribute `type`, decorated
`@CONNECTORS.register`, a subclass of `Plain` that says what is otherwise. Torch modules of its own live in
`rlhf/bridge/layers` and are imported in `build`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from rlhf.slots import Slot

if TYPE_CHECKING:
    from torch import nn


class Connector(Protocol):
    """What every connector offers."""

    type: ClassVar[str]

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, cols) of tokens that one tile of `grid` = (rows, cols) features becomes. Raises `ValueError` for a
        grid it cannot take."""

    @property
    def text_length(self) -> int:
        """So many tokens of what is asked beside the picture go into it; 0 where it sees pictures alone."""

    @property
    def keeps_plane(self) -> bool:
        """Whether tokens lie on the picture as features do."""

    @property
    def reads_plane(self) -> bool:
        """Whether features must lie on the picture."""

    def parameters(self, vision_width: int, text_width: int, vocabulary: int) -> int:
        """How many the module has."""

    def build(self, vision_width: int, text_width: int, vocabulary: int) -> nn.Module:
        """A module: features [tiles, rows * cols, vision_width] of tiles of one shape, their grid (rows, cols), and
        what is asked [tiles, text_length], -1 where there is no token, or None -> [tiles, tokens, text_width]."""


class Plain:
    """A connector that sees the features of pictures alone, wherever they lie, and whose tokens lie nowhere."""

    @property
    def text_length(self) -> int:
        return 0

    @property
    def keeps_plane(self) -> bool:
        return False

    @property
    def reads_plane(self) -> bool:
        return False


CONNECTORS: Slot[Connector] = Slot("connector", __name__)
