"""So many rows of a source: a cap, a share, a number."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from rlhf.data.rows import DataError, Rows
from rlhf.data.selectors import SELECTORS, some
from rlhf.slots import at_least


@SELECTORS.register
@dataclass(frozen=True)
class Cap:
    """At most `rows`, at random (Yi-VL 2403.04652: 50,000 of each source); with `by` of each value of that column."""

    type: ClassVar[str] = "cap"
    rows: int
    by: str | None = None

    def __post_init__(self) -> None:
        at_least("select.cap", self, 1, ("rows",))

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:
        parts: defaultdict[str, list[int]] = defaultdict(list)
        for index in range(len(rows)):
            parts["" if self.by is None else str(rows.bare(index).get(self.by))].append(index)
        if self.by is not None and parts.keys() == {"None"}:
            raise DataError(
                f"{rows.origin}: no row has the column {self.by!r} that `select` caps by; name one that is there"
            )
        kept = [index for part in parts.values() for index in some(part, min(self.rows, len(part)), chance)]
        return sorted(kept)


@SELECTORS.register
@dataclass(frozen=True)
class Fraction:
    """A `share` of the rows, at random (LLaVA-NeXT's study of 10 to 50 %)."""

    type: ClassVar[str] = "fraction"
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"select.fraction share must be above 0 and at most 1, got {self.share}")

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:
        return some(range(len(rows)), max(1, round(self.share * len(rows))), chance)


@SELECTORS.register
@dataclass(frozen=True)
class Resample:
    """Exactly `rows`, fewer or more than there are (MIMIC-IT 2306.05425): more repeat all, and some once more."""

    type: ClassVar[str] = "resample"
    rows: int

    def __post_init__(self) -> None:
        at_least("select.resample", self, 1, ("rows",))

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:
        return some(range(len(rows)), self.rows, chance)
