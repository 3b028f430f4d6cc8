"""As many answers of yes as of no (SVIT 2307.04087)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from rlhf.data.rows import DataError, Rows
from rlhf.data.selectors import SELECTORS, some, text

ANSWER = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@SELECTORS.register
@dataclass(frozen=True)
class YesNo:
    """Of the rows whose answer begins with yes or no, a `share` of yes, their number as before: ones that are too many
    are dropped, others repeated. Rows with other answers stay."""

    type: ClassVar[str] = "yes_no"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"select.yes_no share must lie between 0 and 1, got {self.share}")

    def choose(self, rows: Rows, chance: random.Random) -> list[int]:
        found: dict[str, list[int]] = {"yes": [], "no": [], "": []}
        for index in range(len(rows)):
            said = ANSWER.match(text(rows.bare(index), "assistant"))
            found[said[1].lower() if said else ""].append(index)
        number = len(found["yes"]) + len(found["no"])
        wanted = {"yes": round(self.share * number)}
        wanted["no"] = number - wanted["yes"]
        for answer, count in wanted.items():
            if count and not found[answer]:
                raise DataError(f"{rows.origin}: no answer begins with {answer!r}, so `select` cannot balance them")
        kept = [index for answer, count in wanted.items() if count for index in some(found[answer], count, chance)]
        return sorted([*kept, *found[""]])
