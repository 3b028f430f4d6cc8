"""As many rows of each level of a score (SAIL-Caption2, arXiv:2509.14033 §2.1: judges learn from uniform levels)."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from rlhf.data.rows import DataError, Rows
from rlhf.data.selectors import SELECTORS, some


@SELECTORS.register
@dataclass(frozen=True)
class Levels:
    """As many rows of each value that column `column` has, their number as before: of a value with too many some are
    dropped, of one with too few all are repeated. Raises DataError for a row without the column."""

    type: ClassVar[str] = "levels"
    column: str

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:
        found: dict[object, list[int]] = defaultdict(list)
        for index in range(len(rows)):
            row = rows.bare(index)
            if row.get(self.column) is None:
                raise DataError(f"{rows.origin}, row {index}: no column {self.column!r}, whose values are to be evened")
            found[row[self.column]].append(index)
        each, rest = divmod(len(rows), len(found))
        levels = sorted(found, key=str)
        return sorted(
            index
            for place, level in enumerate(levels)
            if (count := each + (place < rest))
            for index in some(found[level], count, chance)
        )
