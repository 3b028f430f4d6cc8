"""How long the completion is."""

from __future__ import annotations

from rewards.base import Item

HALF = 100  # characters


def brief(item: Item) -> float:
    """1 for nothing, a half for 100 characters, less for more. Beside a reward for what is right, with a small weight:
    alone it teaches to say nothing."""
    return HALF / (HALF + len(item.completion))
