"""What a tiler decides about one picture, as arithmetic: no pixels, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KINDS = ("image",)


def require_kind(kind: str) -> None:
    """Media kinds the bridge can carry. Raises `ValueError` for any other."""
    if kind not in KINDS:
        raise ValueError(
            f"media kind {kind!r} is not implemented; the bridge carries: {', '.join(KINDS)}. "
            "Send the frames of a video as images of one prompt."
        )


@dataclass(frozen=True)
class Tile:
    """One crop the vision encoder sees, of `box` = (height, width) pixels: the whole picture (`global`) or cell (row,
    col) of the grid (`local`)."""

    role: Literal["global", "local"]
    box: tuple[int, int]
    row: int = 0
    col: int = 0


@dataclass(frozen=True)
class Layout:
    """How one picture is cut. `size` is the original (width, height), `grid` is (rows, cols) of local tiles, and
    `tiles` are in the order in which their pixels and their tokens appear."""

    size: tuple[int, int]
    grid: tuple[int, int]
    tiles: tuple[Tile, ...]
    kind: str = "image"

    def __post_init__(self) -> None:
        require_kind(self.kind)
        if min(self.size) < 1:
            raise ValueError(f"a picture needs at least one pixel a side, got (width, height) = {self.size}")

    @property
    def num_tiles(self) -> int:
        return len(self.tiles)


def in_grid(grid: tuple[int, int], box: tuple[int, int], overview: str, whole: tuple[int, int]) -> tuple[Tile, ...]:
    """The tiles of a grid of (rows, cols) boxes, row by row, and where there is more than one an overview of box
    `whole` "first" or "last"; "none" without."""
    rows, cols = grid
    tiles = tuple(Tile("local", box, row, col) for row in range(rows) for col in range(cols))
    if len(tiles) == 1 or overview == "none":
        return tiles
    return (Tile("global", whole), *tiles) if overview == "first" else (*tiles, Tile("global", whole))
