"""How long the completion is."""

from __future__ import annotations

from rewards.base import Item

HALF = 100  # characters


def brief(item: Item) -> float:
    """1 for nothing, a half for 100 characters, less for more. Beside a reward for what is right, with a small weight:
    alone it teaches to say nothing."""
    return HALF / (HALF + len(item.completion))


def within(item: Item, free: int, most: int) -> float:
    """1 for up to `free` tokens, then falling in a line to 0 at `most` (DAPO's soft punishment, arXiv:2503.14476, as a
    part beside others). Raises ValueError unless free < most."""
    if free >= most:
        raise ValueError(f"free = {free} must be below most = {most}")
    return min(1.0, max(0.0, (most - item.num_tokens) / (most - free)))
