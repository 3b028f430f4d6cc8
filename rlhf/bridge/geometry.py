"""The whole media contract of one bridge as arithmetic: picture size -> layout -> token ids. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.bridge.connectors import CONNECTORS, Connector
from rlhf.bridge.encoders import ENCODERS, Encoder
from rlhf.bridge.layout import Layout
from rlhf.bridge.packers import PACKERS, Packer
from rlhf.bridge.slots import settings
from rlhf.bridge.tilers import TILERS, Tiler

VISION_KEYS = ("patch_size", "image_size", "is_native")


@dataclass(frozen=True)
class Geometry:
    """What the processor, the model and vLLM must agree on. `patch_grid` is (rows, cols) of patches in one tile."""

    tiler: Tiler
    encoder: Encoder
    connector: Connector
    packer: Packer
    patch_grid: tuple[int, int]
    tokens_per_tile: int
    image_token_id: int
    vision: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls,
        *,
        tiler: Mapping[str, Any],
        encoder: Mapping[str, Any],
        connector: Mapping[str, Any],
        packer: Mapping[str, Any],
        vision: Mapping[str, Any],
        image_token_id: int,
    ) -> Geometry:
        """From the plain dicts of a config. `vision` needs `patch_size` and `image_size`. Raises `ValueError` where
        components do not fit together."""
        parts = TILERS.make(tiler), ENCODERS.make(encoder), CONNECTORS.make(connector), PACKERS.make(packer)
        seen = {key: vision[key] for key in VISION_KEYS if key in vision}
        grid = parts[1].patch_grid(parts[0].box, seen)
        tokens = parts[2].num_tokens(grid)
        if tokens < 3:
            # The wrap's two tokens must stay outnumbered: vLLM takes the most frequent id for the placeholder.
            raise ValueError(f"a tile becomes {tokens} tokens, which is too few: use larger tiles or smaller patches")
        return cls(*parts, grid, tokens, image_token_id, tuple(sorted(seen.items())))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Geometry:
        """The inverse of `to_dict`."""
        return cls.of(**fields)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, every default spelt out."""
        return {
            "tiler": settings(self.tiler),
            "encoder": settings(self.encoder),
            "connector": settings(self.connector),
            "packer": settings(self.packer),
            "vision": {key: list(v) if isinstance(v, tuple) else v for key, v in self.vision},
            "image_token_id": self.image_token_id,
        }

    def layout(self, width: int, height: int) -> Layout:
        """How a picture of this size is cut."""
        return self.tiler.layout(width, height)

    def pattern(self, layout: Layout) -> list[int]:
        """Token ids that replace the one placeholder of a picture."""
        return self.packer.pattern(layout, self.tokens_per_tile, self.image_token_id)

    def num_features(self, layout: Layout) -> int:
        """Feature rows the model makes of the picture; equals the placeholders in `pattern(layout)`."""
        return layout.num_tiles * self.tokens_per_tile

    def expand(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Un-expanded ids (one placeholder a picture) -> expanded ids. `sizes` are (width, height) in order.
        Raises `ValueError` when placeholders and pictures differ in number."""
        found = sum(token == self.image_token_id for token in token_ids)
        if found != len(sizes):
            raise ValueError(
                f"{found} image placeholders (id {self.image_token_id}) for {len(sizes)} images; "
                "un-expanded ids carry exactly one placeholder for each image"
            )
        pictures = iter(sizes)
        expanded: list[int] = []
        for token in token_ids:
            if token == self.image_token_id:
                expanded.extend(self.pattern(self.layout(*next(pictures))))
            else:
                expanded.append(token)
        return expanded
