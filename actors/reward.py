"""Reward functions in a process of their own: what user code breaks, it breaks here."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.base import Item, Reward, evaluate, resolve
from rlhf.types import Score


class RewardWorker:
    """Runs reward functions by name; an exception is a failed Score, not the end of the process."""

    def __init__(self) -> None:
        self._functions: dict[str, Reward] = {}

    def score(self, function: str, items: Sequence[Item]) -> list[Score]:
        """One Score an item. Raises ValueError when `function` cannot be found."""
        if function not in self._functions:
            self._functions[function] = resolve(function)
        return evaluate(self._functions[function], items)
