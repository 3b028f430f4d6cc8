"""The whole media contract of one bridge as arithmetic: picture size -> layout -> token ids. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.bridge.connectors import CONNECTORS, Connector
from rlhf.bridge.encoders import ENCODERS, Encoder
from rlhf.bridge.layout import Layout, Tile
from rlhf.bridge.packers import PACKERS, Packer
from rlhf.bridge.tilers import TILERS, Tiler
from rlhf.slots import settings

VISION_KEYS = ("patch_size", "image_size", "is_native")


@dataclass(frozen=True)
class Geometry:
    """What the processor, the model and vLLM must agree on.

    Pixels travel as cells, [cells, 3, height, width] in the order of the layout's tiles, each row by row: whole tiles
    where all are alike, patches where their shapes differ."""

    tiler: Tiler
    encoder: Encoder
    connector: Connector
    packer: Packer
    image_token_id: int
    vision: tuple[tuple[str, Any], ...]
    told: str = "nothing"  # what the decoder knows of a token beside its position: see `rlhf.bridge.positions`
    reply_token_id: int | None = None  # where it is told what is asked: the token that ends a prompt

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
        told: str = "nothing",
        reply_token_id: int | None = None,
    ) -> Geometry:
        """From the plain dicts of a config. `vision` needs `patch_size`, and for a tower `image_size`. Raises
        `ValueError` where components do not fit together."""
        parts = TILERS.make(tiler), ENCODERS.make(encoder), CONNECTORS.make(connector), PACKERS.make(packer)
        read = (*VISION_KEYS, "num_hidden_layers") if encoder.get("every") else VISION_KEYS
        seen = {key: vision[key] for key in read if key in vision}
        geometry = cls(*parts, image_token_id, tuple(sorted(seen.items())), told, reply_token_id)
        geometry.require_fit()
        for size in geometry.tiler.extremes:
            layout = geometry.layout(*size)
            ids = Counter(geometry.pattern(layout))
            if any(count >= ids[image_token_id] for token, count in ids.items() if token != image_token_id):
                raise ValueError(
                    f"a picture of (width, height) = {size} becomes {ids[image_token_id]} placeholders, no more than "
                    "of one of the tokens around them, and vLLM cannot tell them: use larger tiles or smaller patches"
                )
        return geometry

    def require_fit(self) -> None:
        """Raise `ValueError` where one component needs of another what that does not give."""
        connector, packer = f"connector.{self.connector.type}", f"packer.{self.packer.type}"
        if self.connector.reads_plane and not self.encoder.planar:
            raise ValueError(
                f"{connector} joins neighbouring patches, and this encoder's features are not those of one layer: take "
                'encoder.feature = "patch" and one layer'
            )
        if self.packer.reads_plane and not (self.encoder.planar and self.connector.keeps_plane):
            raise ValueError(
                f"{packer} ends rows of tokens, and those of {connector} or of this encoder lie in no rows: take a "
                "projection of patches"
            )
        if self.packer.type == "feature_map" and getattr(self.tiler, "fit", "pad") != "pad":
            raise ValueError('packer.feature_map cuts padding away: take tiler.fit = "pad", or another packer')
        layouts = [self.layout(*size) for size in self.tiler.extremes]
        if self.told == "pictures" and len(set(map(self.num_features, layouts))) > 1:
            raise ValueError(
                "this decoder counts the features of a picture, and pictures of this tiler have different numbers of "
                'them: take tiler.type = "single"'
            )
        if getattr(self.connector, "aligned", 0) and any(len(layout.tiles) > 1 or self.sized for layout in layouts):
            raise ValueError(f'{connector} aligned compares pictures of one tile: take tiler.type = "single"')
        steps, _ = self.packer.placing(2)
        if self.told != "pictures" and steps != [1, 1]:
            raise ValueError(
                f'{packer} positions = "each" is all that a decoder without layers of its own for pictures can do'
            )
        if windows := self.encoder.windows:
            most = max(sum(tile.role == "local" for tile in layout.tiles) for layout in layouts)
            if not most:
                raise ValueError("encoder.windows are of a picture's local tiles, and this tiler makes none: remove it")
            if most > windows:
                raise ValueError(f"a picture is cut into up to {most} tiles, but encoder.windows = {windows}: raise it")

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
            "told": self.told,
            **({} if self.reply_token_id is None else {"reply_token_id": self.reply_token_id}),
        }

    def layout(self, width: int, height: int) -> Layout:
        """How a picture of this size is cut."""
        return self.tiler.layout(width, height)

    @property
    def sized(self) -> bool:
        """Whether a picture's features depend on its size, and not on its tiles alone: the model needs it then."""
        return not self.packer.plain or self.encoder.windows > 0 or self.shapes_differ

    @property
    def shapes_differ(self) -> bool:
        """Whether tiles have shapes of their own, each of which goes through the encoder by itself."""
        tiles = (tile for size in self.tiler.extremes for tile in self.layout(*size).tiles)
        return any(tile.box != self.tiler.cell for tile in tiles)

    def features(self, tile: Tile) -> tuple[int, int]:
        """(rows, cols) of features the encoder makes of a tile."""
        return self.encoder.grid(tile.box, dict(self.vision))

    def grids(self, layout: Layout) -> list[tuple[int, int]]:
        """(rows, cols) of tokens each tile becomes."""
        return [self.connector.grid(self.features(tile)) for tile in layout.tiles]

    def cells_of(self, tile: Tile) -> int:
        """Rows of pixels that carry a tile."""
        high, wide = self.tiler.cell
        return (tile.box[0] // high) * (tile.box[1] // wide)

    def cells(self, layout: Layout) -> int:
        """Rows of pixels that carry the picture."""
        return sum(map(self.cells_of, layout.tiles))

    def pattern(self, layout: Layout) -> list[int]:
        """Token ids that replace the one placeholder of a picture."""
        return self.packer.pattern(layout, self.grids(layout), self.image_token_id)

    def num_features(self, layout: Layout) -> int:
        """Placeholders in `pattern(layout)`: as many features as the model makes of the picture."""
        return self.pattern(layout).count(self.image_token_id)

    @property
    def placing(self) -> tuple[list[int], list[bool]]:
        """Of each placeholder of a picture, every picture having as many: by how much positions advance, and whether
        the decoder takes it for a part of the picture."""
        return self.packer.placing(self.num_features(self.layout(*self.tiler.extremes[0])))

    @property
    def most_tokens(self) -> int:
        """The longest pattern a picture can become."""
        return max(len(self.pattern(self.layout(*size))) for size in self.tiler.extremes)

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
