"""Vision encoders turn tiles into patch features. Importing this package needs no torch.

A new encoder is one new module here: a frozen dataclass with a class attribute `type`, decorated `@ENCODERS.register`.
Its torch module lives in `rlhf/bridge/layers` and is imported in `build`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rlhf.bridge.slots import Slot

if TYPE_CHECKING:
    from torch import nn


class Encoder(Protocol):
    """What every encoder offers."""

    type: ClassVar[str]

    @property
    def mean(self) -> tuple[float, float, float]:
        """Subtracted from each colour channel of pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Then divided by."""

    def patch_grid(self, box: tuple[int, int], vision: dict[str, Any]) -> tuple[int, int]:
        """(rows, cols) of patch features for one tile of `box` = (height, width). `vision` is the vision config as a
        plain dict. Raises `ValueError` for a box the encoder cannot see."""

    def build(self, config: Any) -> nn.Module:
        """A module: normalised pixels [tiles, 3, height, width] -> features [tiles, rows * cols, width]."""


ENCODERS: Slot[Encoder] = Slot("encoder", __name__)
