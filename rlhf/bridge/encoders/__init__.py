"""Vision encoders turn tiles into features. Importing this package needs no torch.

A new encoder is one new module here: a frozen dataclass with a class attribute `type`, decorated `@ENCODERS.register`.
Its torch module lives in `rlhf/bridge/layers` and is imported in `build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rlhf.slots import Slot

if TYPE_CHECKING:
    from torch import nn


class Encoder(Protocol):
    """What every encoder offers. `vision` is the vision config as a plain dict."""

    type: ClassVar[str]

    @property
    def mean(self) -> tuple[float, float, float]:
        """Subtracted from each colour channel of pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Then divided by."""

    @property
    def windows(self) -> int:
        """So many local tiles have weights of their own; 0 where all tiles are seen alike."""

    @property
    def planar(self) -> bool:
        """Whether features lie on the picture, rows by columns."""

    def parameters(self, vision: Mapping[str, Any]) -> int:
        """How many it has beside those of the tower."""

    def grid(self, box: tuple[int, int], vision: Mapping[str, Any]) -> tuple[int, int]:
        """(rows, cols) of features for one tile of `box` = (height, width). Raises `ValueError` for a box the encoder
        cannot see."""

    def width(self, vision: Mapping[str, Any]) -> int:
        """Of a feature."""

    def build(self, config: Any) -> nn.Module:
        """A module: normalised pixels [tiles, 3, height, width] and, where there are any, the windows [tiles] of the
        tiles, −1 for an overview -> features [tiles, rows * cols, width]."""


ENCODERS: Slot[Encoder] = Slot("encoder", __name__)
