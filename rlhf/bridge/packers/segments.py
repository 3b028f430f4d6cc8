"""The features of a picture's tiles, tile after tile, with tokens or vectors around and between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf.bridge.layout import Layout
from rlhf.bridge.packers import PACKERS, Grids
from rlhf.slots import one_of, token_id, token_pair

if TYPE_CHECKING:
    from torch import nn

EDGES = ("none", "learned", "zeros")
POSITIONS = ("each", "shared", "none")


@PACKERS.register
@dataclass(frozen=True)
class SegmentsPacker:
    """`wrap`: tokens set before and after each picture (SAIL-VL2's `<img>`, `</img>`) · `edges`: vectors there, in
    places of their own, learned (CogVLM) or zero (InternLM-XComposer) · `between`: a token between the tiles of a row,
    `row_end`: one after each row of tiles (LLaVA-UHD: a comma and a new line) · `newline`: a token after each row of a
    tile's own tokens (Fuyu) · `positions`, for a decoder with layers for pictures: each feature has one of its own, all
    of a picture share one (CogVLM), or they take none (Flamingo). A recipe writes tokens, and `build` looks their ids
    up."""

    type: ClassVar[str] = "segments"
    token_keys: ClassVar[tuple[str, ...]] = ("wrap", "between", "row_end", "newline")
    wrap: tuple[int, int] | None = None
    edges: str = "none"
    between: int | None = None
    row_end: int | None = None
    newline: int | None = None
    positions: str = "each"

    def __post_init__(self) -> None:
        one_of("packer.segments edges", self.edges, EDGES)
        one_of("packer.segments positions", self.positions, POSITIONS)
        object.__setattr__(self, "wrap", token_pair("packer.segments wrap", self.wrap))
        for name in ("between", "row_end", "newline"):
            token_id(f"packer.segments {name}", getattr(self, name))

    @property
    def plain(self) -> bool:
        return self.edges == "none"

    @property
    def reads_plane(self) -> bool:
        return self.newline is not None

    def pattern(self, layout: Layout, grids: Grids, image_token_id: int) -> list[int]:
        found: list[int] = []
        for tile, (rows, cols) in zip(layout.tiles, grids, strict=True):
            if self.newline is None:
                found += [image_token_id] * (rows * cols)
            else:
                found += [*[image_token_id] * cols, self.newline] * rows
            if tile.role == "local":
                last = tile.col == layout.grid[1] - 1
                after = self.row_end if last else self.between
                found += [] if after is None else [after]
        if not self.plain:
            found = [image_token_id, *found, image_token_id]
        return found if self.wrap is None else [self.wrap[0], *found, self.wrap[1]]

    def placing(self, count: int) -> tuple[list[int], list[bool]]:
        edge = 0 if self.plain else 1
        inside = count - 2 * edge
        steps = {"each": [1] * inside, "shared": [1] + [0] * (inside - 1), "none": [0] * inside}[self.positions]
        # CogVLM's own code: the vector that ends a picture is text to the experts, the one that begins it is not
        return [1] * edge + steps + [1] * edge, [True] * (count - edge) + [False] * edge

    def parameters(self, text_width: int) -> int:
        return 2 * text_width if self.edges == "learned" else 0

    def build(self, text_width: int) -> nn.Module:
        from rlhf.bridge.layers.packing import Segments

        return Segments(text_width, self.edges)
