"""A vision transformer of Hugging Face transformers (SigLIP, AIMv2) used as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.bridge.encoders import ENCODERS
from rlhf.bridge.slots import pair

if TYPE_CHECKING:
    from torch import nn

HALF = (0.5, 0.5, 0.5)


@ENCODERS.register
@dataclass(frozen=True)
class TowerEncoder:
    """`layer`: -1 is the tower's output after its final norm, -2 the output of the last layer but one, and so on
    (LLaVA's numbering) · `interpolate`: resize the position table to tiles of another shape (SigLIP) · `mean`, `std`:
    colour normalisation the tower was trained with (AIMv2 and CLIP have their own)."""

    type: ClassVar[str] = "tower"
    layer: int = -1
    interpolate: bool = False
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        if self.layer >= 0:
            raise ValueError(f"encoder.tower layer counts from the end: -1, -2, ...; got {self.layer}")
        for name in ("mean", "std"):
            channels = tuple(float(channel) for channel in getattr(self, name))
            if len(channels) != 3:
                raise ValueError(f"encoder.tower {name} needs three numbers, got {channels}")
            object.__setattr__(self, name, channels)

    def patch_grid(self, box: tuple[int, int], vision: dict[str, Any]) -> tuple[int, int]:
        patch = pair("vision.patch_size", vision["patch_size"])
        image = pair("vision.image_size", vision["image_size"])
        native = bool(vision.get("is_native"))
        if box != image and not (native or self.interpolate):
            raise ValueError(
                f"tiles are {box} (height, width) but the vision tower's position table is for {image}: make them "
                "equal, or set encoder.interpolate = true (SigLIP) or vision.is_native = true (AIMv2)"
            )
        if box[0] % patch[0] or box[1] % patch[1]:
            raise ValueError(f"tiles of {box} (height, width) do not divide into patches of {patch}")
        return box[0] // patch[0], box[1] // patch[1]

    def build(self, config: Any) -> nn.Module:
        from rlhf.bridge.layers.tower import Tower

        return Tower(config, self.layer, self.interpolate)
