"""Pixels: fit a picture into a box, and turn boxes into a tensor. PIL and torch only, so torchvision is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from rlhf.bridge.slots import unknown

if TYPE_CHECKING:
    import torch

FITS = ("stretch", "pad", "crop")
# Mid-grey: zero after the usual mean 0.5, so padding carries no signal.
PADDING = (127, 127, 127)


def rgb(image: Image.Image) -> Image.Image:
    """Three channels; transparency is laid on mid-grey (a plain conversion would turn it black)."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (*PADDING, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, box: tuple[int, int], how: str) -> Image.Image:
    """`image` as an RGB picture of exactly `box` = (height, width).

    stretch: both sides scaled alone · pad: aspect kept, centred on grey · crop: aspect kept, centre cut out.
    """
    picture, size = rgb(image), (box[1], box[0])
    if how == "stretch":
        return picture.resize(size, Image.Resampling.BICUBIC)
    if how == "pad":
        return ImageOps.pad(picture, size, Image.Resampling.BICUBIC, color=PADDING)
    if how == "crop":
        return ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
    raise unknown("fit", how, FITS)


def to_tensor(tiles: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> float tensor [tiles, 3, height, width] in [0, 1]."""
    # Here, so that the layouts of this package stay importable without torch (`rlhf plan`).
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255
