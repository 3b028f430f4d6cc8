"""Attention with several heads, for modules whose projections are their own."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """query [tiles, asking, width], key and value [tiles, seen, width] -> [tiles, asking, width]. `mask` [tiles or 1,
    1, asking or 1, seen] is True where one may look; `scale` is head width^-½ unless given."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)
