"""A vision transformer of Hugging Face transformers (CLIP, SigLIP, AIMv2) used as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.bridge.decoders.modality_adapter import adapter_parameters
from rlhf.bridge.encoders import ENCODERS
from rlhf.slots import at_least, one_of, pair, three

if TYPE_CHECKING:
    from torch import nn

HALF = (0.5, 0.5, 0.5)
FEATURES = ("patch", "cls", "all")


@ENCODERS.register
@dataclass(frozen=True)
class TowerEncoder:
    """`layer`: -1 is the tower's output after its final norm, -2 the output of the last layer but one, and so on
    (LLaVA's numbering; layers above it are not built); several of them end to end; or `every`: the last of each so many
    layers (LaVIN: 4) · `feature`: the patches, the
    class token of a tower that has one (CLIP), or "all", the class token first · `interpolate`: resize the position
    table to tiles of another shape (CLIP, SigLIP) · `mean`, `std`: colour normalisation the tower was trained with
    (AIMv2 and CLIP have their own) · `windows`: so many local tiles have low-rank updates of their own to the tower
    (CLIP, SigLIP), of ranks `attention_rank` and `mlp_rank` (Monkey) · `adapter_rank`: above 0, adapters before each
    layer's attention, in `adapter_groups`, mixed by what a router sees of the class token (CLIP; LaVIN)."""

    type: ClassVar[str] = "tower"
    layer: int | tuple[int, ...] = -1
    every: int = 0
    feature: str = "patch"
    interpolate: bool = False
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    windows: int = 0
    attention_rank: int = 16
    mlp_rank: int = 32
    adapter_rank: int = 0
    adapter_groups: int = 2
    adapter_scale: float = 1.0
    router_temperature: float = 10.0

    def __post_init__(self) -> None:
        at_least("encoder.tower", self, 0, ("windows", "adapter_rank", "every"))
        at_least("encoder.tower", self, 1, ("attention_rank", "mlp_rank", "adapter_groups"))
        if self.adapter_rank % self.adapter_groups:
            raise ValueError(
                f"encoder.tower adapter_rank = {self.adapter_rank} does not divide into adapter_groups = "
                f"{self.adapter_groups}"
            )
        if not isinstance(self.layer, int):
            object.__setattr__(self, "layer", tuple(self.layer))
        given = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        if not given or max(given) >= 0:
            raise ValueError(f"encoder.tower layer counts from the end: -1, -2, ...; got {self.layer}")
        if self.windows and (self.every or len(given) > 1):
            raise ValueError("encoder.tower windows are for a tower of which one layer is read")
        one_of("encoder.tower feature", self.feature, FEATURES)
        for name in ("mean", "std"):
            object.__setattr__(self, name, three(f"encoder.tower {name}", getattr(self, name)))

    def layers(self, vision: Mapping[str, Any]) -> tuple[int, ...]:
        """Those that are read, counted from the end."""
        if not self.every:
            return (self.layer,) if isinstance(self.layer, int) else self.layer
        total = int(vision["num_hidden_layers"])
        if self.every > total:
            raise ValueError(f"encoder.tower every = {self.every}: the tower has {total} layers only")
        return tuple(layer - total - 1 for layer in range(self.every, total + 1, self.every))

    def grid(self, box: tuple[int, int], vision: Mapping[str, Any]) -> tuple[int, int]:
        if "image_size" not in vision:
            raise ValueError(
                'encoder.tower needs a vision transformer; vision.type = "patches" goes with encoder.patches'
            )
        patch = pair("vision.patch_size", vision["patch_size"])
        image = pair("vision.image_size", vision["image_size"])
        if box != image and not (vision.get("is_native") or self.interpolate):
            raise ValueError(
                f"tiles are {box} (height, width) but the vision tower's position table is for {image}: make them "
                "equal, or set encoder.interpolate = true (CLIP, SigLIP) or vision.is_native = true (AIMv2)"
            )
        if box[0] % patch[0] or box[1] % patch[1]:
            raise ValueError(f"tiles of {box} (height, width) do not divide into patches of {patch}")
        rows, cols = box[0] // patch[0], box[1] // patch[1]
        read = len(self.layers(vision))
        if self.feature == "cls":
            return 1, read
        if self.feature == "all":
            return 1, read * (1 + rows * cols)
        return read * rows, cols

    @property
    def planar(self) -> bool:
        return self.feature == "patch" and isinstance(self.layer, int) and not self.every

    def parameters(self, vision: Mapping[str, Any]) -> int:
        width, layers = int(vision["hidden_size"]), int(vision["num_hidden_layers"]) + 1 + max(self.layers(vision))
        attention = self.attention_rank * (width + 3 * width) + self.attention_rank * 2 * width
        windows = self.windows * (attention + self.mlp_rank * 2 * width + 3)
        adapter = adapter_parameters(width, self.adapter_rank, self.adapter_groups) if self.adapter_rank else 0
        return layers * (windows + adapter)

    def width(self, vision: Mapping[str, Any]) -> int:
        return int(vision["hidden_size"])

    def build(self, config: Any) -> nn.Module:
        from rlhf.bridge.layers.tower import Tower

        return Tower(config, self)
