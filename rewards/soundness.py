"""Is every step of the chain right? The digits' own verifier: the truth a judge is measured against."""

from __future__ import annotations

from rewards.base import Item
from rlhf.data.chains import check_chain
from rlhf.data.critique import critique_of
from rlhf.data.judging import parse_verdict
from rlhf.types import Score


def digits(item: Item) -> Score:
    """1.0 when `rlhf.data.chains.check_chain` finds every step true of the image, else 0.0 with the first fault as
    note. Raises KeyError when the row has no `category`, `digits` or `answer`."""
    row = item.prompt.columns
    check = check_chain(row["category"], row["digits"], item.completion, str(row["answer"]), row.get("target"))
    return Score("scored", 1.0 if check.sound else 0.0, note=check.reason)


def critique(item: Item) -> Score:
    """The same in a judge's words: the note is what a careful judge says, the value 1.0 when that ends in yes."""
    row = item.prompt.columns
    said = critique_of(row["category"], row["digits"], item.completion, row.get("target"))
    return Score("scored", 1.0 if parse_verdict(said) else 0.0, note=said)
