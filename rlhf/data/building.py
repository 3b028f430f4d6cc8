"""What builders of rows share: a table by its name, options by theirs, and rows in turns."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from rlhf.data.rows import DataError, Row

Settings = TypeVar("Settings")


def built(
    builder: str,
    makers: Mapping[str, Callable[[random.Random, Settings, str, int], Row]],
    table: str,
    rows: int,
    split: str,
    seed: int,
    settings: Settings,
) -> list[Row]:
    """`rows` rows of a table, each told its turn: exact shares of kinds of row, in random order."""
    rng = random.Random(f"{builder}/{table}/{split}/{seed}")
    turns = list(range(rows))
    rng.shuffle(turns)
    return [makers[table](rng, settings, split, turn) for turn in turns]


def require_table(builder: str, makers: Iterable[str], table: str, split: str) -> None:
    """Raise DataError for a table or a split that there is none of."""
    known = list(makers)
    if table not in known:
        raise DataError(f"{builder} has no table {table!r}{nearest(table, known)}; it has {', '.join(known)}")
    if split not in {"train", "heldout"}:
        raise DataError(f"split {split!r}; the splits are train and heldout")


def options_of(builder: str, kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """The dataclass `kind` of a recipe's options. Raises DataError for one that it has none of."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise DataError(f"{builder} has no option {key!r}{nearest(key, known)}; it has {', '.join(known)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def takes(turn: int, share: float) -> bool:
    """Whether a turn is one of a `share` of all, spread evenly: every second one at 0.5."""
    return int((turn + 1) * share) != int(turn * share)
