"""Tilers cut a picture into the boxes a vision encoder sees. Importing this package needs no torch.

A new tiler is one new module here: a frozen dataclass with a class attribute `type`, decorated `@TILERS.register`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from rlhf.bridge.layout import Layout
from rlhf.bridge.slots import Slot

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Tiler(Protocol):
    """What every tiler offers."""

    type: ClassVar[str]

    @property
    def box(self) -> tuple[int, int]:
        """(height, width) in pixels of every tile."""

    @property
    def most_tiles(self) -> int:
        """No picture becomes more tiles than this."""

    def layout(self, width: int, height: int) -> Layout:
        """How a picture of this size is cut: pure arithmetic."""

    def apply(self, image: Image.Image, layout: Layout) -> torch.Tensor:
        """Pixels [tiles, 3, height, width] in [0, 1], tiles in the layout's order."""


TILERS: Slot[Tiler] = Slot("tiler", __name__)
