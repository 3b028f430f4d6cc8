"""No vision transformer: a patch's pixels are its features, and the connector projects them (Fuyu, OtterHD)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.bridge.encoders import ENCODERS
from rlhf.bridge.encoders.tower import HALF
from rlhf.slots import pair, three

if TYPE_CHECKING:
    from torch import nn


@ENCODERS.register
@dataclass(frozen=True)
class PatchEncoder:
    """Features of `vision.patch_size`² x 3 numbers, rows of pixels slowest, then columns, then channels, as in Fuyu.
    Takes `vision = { type = "patches", patch_size = 30 }`."""

    type: ClassVar[str] = "patches"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, three(f"encoder.patches {name}", getattr(self, name)))

    @property
    def planar(self) -> bool:
        return True

    @property
    def windows(self) -> int:
        return 0

    def parameters(self, vision: Mapping[str, Any]) -> int:  # noqa: ARG002
        return 0

    def grid(self, box: tuple[int, int], vision: Mapping[str, Any]) -> tuple[int, int]:
        if "image_size" in vision:
            raise ValueError(
                'encoder.patches has no vision transformer: take vision.type = "patches", or encoder.tower'
            )
        patch = pair("vision.patch_size", vision["patch_size"])
        if box[0] % patch[0] or box[1] % patch[1]:
            raise ValueError(f"tiles of {box} (height, width) do not divide into patches of {patch}")
        return box[0] // patch[0], box[1] // patch[1]

    def width(self, vision: Mapping[str, Any]) -> int:
        patch = pair("vision.patch_size", vision["patch_size"])
        return 3 * patch[0] * patch[1]

    def build(self, config: Any) -> nn.Module:
        from rlhf.bridge.layers.patches import Patches

        return Patches(pair("vision.patch_size", config.patch_size))
