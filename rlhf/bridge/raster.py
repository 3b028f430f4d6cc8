"""Pixels: fit a picture into a box, cut boxes, and turn them into a tensor. PIL and torch only, so torchvision is not
needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from rlhf.slots import unknown

if TYPE_CHECKING:
    import torch

    from rlhf.bridge.layout import Tile

Colour = tuple[int, int, int]
FITS = ("stretch", "pad", "crop")
# Zero after the usual mean 0.5, so padding carries no signal.
GREY: Colour = (127, 127, 127)


def rgb(image: Image.Image) -> Image.Image:
    """Three channels; transparency is laid on mid-grey (a plain conversion would turn it black)."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (*GREY, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, box: tuple[int, int], how: str, padding: Colour = GREY) -> Image.Image:
    """`image` as an RGB picture of exactly `box` = (height, width).

    stretch: both sides scaled alone · pad: aspect kept, centred on `padding` · crop: aspect kept, centre cut out.
    """
    size = (box[1], box[0])
    if how == "stretch":
        return rgb(image).resize(size, Image.Resampling.BICUBIC)
    if how == "pad":
        scale = min(box[1] / image.width, box[0] / image.height)
        # the longer side fills the box and the shorter is rounded up, as in LLaVA-NeXT
        sides = min(math.ceil(image.height * scale), box[0]), min(math.ceil(image.width * scale), box[1])
        return place(image, sides, box, ((box[0] - sides[0]) // 2, (box[1] - sides[1]) // 2), padding)
    if how == "crop":
        return ImageOps.fit(rgb(image), size, Image.Resampling.BICUBIC)
    raise unknown("fit", how, FITS)


def place(
    image: Image.Image, sides: tuple[int, int], box: tuple[int, int], corner: tuple[int, int], padding: Colour
) -> Image.Image:
    """`image` scaled to `sides` = (height, width), its upper left corner at `corner` = (down, right) of a `box`."""
    canvas = Image.new("RGB", (box[1], box[0]), padding)
    scaled = rgb(image)
    if (scaled.height, scaled.width) != sides:
        scaled = scaled.resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
    canvas.paste(scaled, (corner[1], corner[0]))
    return canvas


def cut(canvas: Image.Image, tile: Tile) -> Image.Image:
    """A local tile of a picture that is laid on a canvas."""
    high, wide = tile.box
    return canvas.crop((tile.col * wide, tile.row * high, (tile.col + 1) * wide, (tile.row + 1) * high))


def to_cells(tiles: Sequence[Image.Image], cell: tuple[int, int]) -> torch.Tensor:
    """RGB pictures -> float tensor [cells, 3, height, width] in [0, 1]: tile after tile, of each its cells row by
    row."""
    # Here, so that the layouts of this package stay importable without torch (`rlhf plan`).
    import torch

    found = []
    for tile in tiles:
        pixels = np.asarray(tile)
        (high, wide), (rows, cols) = cell, (tile.height // cell[0], tile.width // cell[1])
        found.append(pixels.reshape(rows, high, cols, wide, 3).swapaxes(1, 2).reshape(rows * cols, high, wide, 3))
    return torch.from_numpy(np.concatenate(found)).permute(0, 3, 1, 2).contiguous().float() / 255


def from_cells(cells: torch.Tensor, box: tuple[int, int]) -> torch.Tensor:
    """The inverse for tiles of one box: [tiles * cells, 3, height, width] -> [tiles, 3, *box]."""
    channels, high, wide = cells.shape[1:]
    rows, cols = box[0] // high, box[1] // wide
    parts = cells.reshape(-1, rows, cols, channels, high, wide).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(-1, channels, *box)
