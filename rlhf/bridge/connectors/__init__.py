"""Connectors project patch features into the decoder's width. Importing this package needs no torch.

A new connector is one new module here: a frozen dataclass with a class attribute `type`, decorated
`@CONNECTORS.register`. Torch modules of its own live in `rlhf/bridge/layers` and are imported in `build`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from rlhf.bridge.slots import Slot

if TYPE_CHECKING:
    from torch import nn


class Connector(Protocol):
    """What every connector offers."""

    type: ClassVar[str]

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens one tile of `grid` = (rows, cols) patches becomes. Raises `ValueError` for a grid it cannot take."""

    def build(self, grid: tuple[int, int], vision_width: int, text_width: int) -> nn.Module:
        """A module: features [tiles, rows * cols, vision_width] -> [tiles, num_tokens(grid), text_width]."""


CONNECTORS: Slot[Connector] = Slot("connector", __name__)
