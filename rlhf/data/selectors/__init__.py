"""Selectors choose rows of a source before anything else sees it; a recipe lists them, and each takes what the one
before it left.

A new selector is one new module here: a frozen dataclass with a class attribute `type`, decorated
`@SELECTORS.register`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from rlhf.data.rows import DataError, Row, Rows
from rlhf.slots import Slot


class Selector(Protocol):
    """What every selector offers."""

    type: ClassVar[str]

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:
        """Which rows stay, by index, each as often as it is named; the same for the same rows and chance."""


SELECTORS: Slot[Selector] = Slot("selector", __name__)


def select(rows: Rows, settings: Iterable[Mapping[str, Any]], seed: int) -> Rows:
    """The rows that selectors leave, one after the other. Raises DataError where none are left."""
    for place, table in enumerate(settings):
        selector = SELECTORS.make(table)
        rows = rows.select(selector.choose(rows, random.Random(f"{seed}/{place}/{table['type']}")))
        if len(rows) == 0:
            raise DataError(f"{rows.origin}: `select` number {place + 1} ({table['type']}) leaves no row; change it")
    return rows


def text(row: Row, *roles: str) -> str:
    """The words of a row's messages, of these roles or all."""
    said = list[str]()
    for message in row["messages"]:
        if not roles or message["role"] in roles:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
            said.extend(parts)
    return " ".join(said)


def some(indexes: Sequence[int], count: int, chance: random.Random) -> list[int]:
    """`count` of these in their order: a random subset, or each as often as it goes and a random subset once more."""
    whole, rest = divmod(count, len(indexes))
    found = [*list(indexes) * whole, *chance.sample(list(indexes), rest)]
    return sorted(found)
