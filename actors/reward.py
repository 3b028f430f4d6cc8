"""Reward functions away from everything else: a Ray actor around the process that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.base import Item
from rewards.isolation import Isolated, Limits
from rlhf.types import Score


class RewardWorker:
    """Runs reward functions by name; whatever one does costs its own sample, and no other."""

    def __init__(self, limits: Limits) -> None:
        self._process = Isolated(limits)

    def score(self, function: str, items: Sequence[Item], options: Mapping[str, Any]) -> list[Score]:
        """One Score an item. Raises ValueError when `function` cannot be used."""
        return self._process.score(function, items, options)
