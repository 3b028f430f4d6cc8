"""Tilers cut a picture into the boxes a vision encoder sees. Importing this package needs no torch.

A new tiler is one new module here: a frozen dataclass with a class attribute `type`, decorated `@TILERS.register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from rlhf.bridge.layout import Layout
from rlhf.slots import Slot

if TYPE_CHECKING:
    from PIL import Image


class Tiler(Protocol):
    """What every tiler offers."""

    type: ClassVar[str]

    @property
    def cell(self) -> tuple[int, int]:
        """(height, width) in pixels of which every tile's box is a multiple. Pixels travel as cells; where all tiles
        are alike a cell is a tile."""

    @property
    def extremes(self) -> Sequence[tuple[int, int]]:
        """Sizes (width, height) of pictures: first one that becomes fewest tokens, then such as, among them, become
        most."""

    def layout(self, width: int, height: int) -> Layout:
        """How a picture of this size is cut: pure arithmetic."""

    def apply(self, image: Image.Image, layout: Layout) -> list[Image.Image]:
        """RGB pictures of the boxes of the layout's tiles, in its order."""


TILERS: Slot[Tiler] = Slot("tiler", __name__)
