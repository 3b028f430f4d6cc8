"""Where things are, on a grid of 0 to 999: boxes and points."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.answer import final_answer
from rewards.base import Item
from rlhf.types import Score

GRID = 999
NUMBER = r"-?\d{1,6}(?:\.\d{1,6})?"
NUMBERS = re.compile(rf"(?<![\w.]){NUMBER}(?!\w|\.\d)")
BETWEEN = r"[\s,()\[\]]{1,8}"


def iou(item: Item, at: float | None = None) -> Score:
    """Intersection over union of the first box of the final answer, four numbers left, top, right, bottom on a grid of
    0 to 999, and the row's column `box`; with `at`, 1.0 from there on, else 0.0. No box is 0."""
    box = _first(item, 4)
    if box is None:
        return Score("scored", 0.0, note="no box of four numbers from 0 to 999")
    value = overlap(box, _box(item))
    return Score("scored", value if at is None else float(value >= at), note=f"{box} overlaps by {value:.3f}")


def point(item: Item) -> Score:
    """1.0 where the first point of the final answer, two numbers x, y on a grid of 0 to 999, lies in the row's `box`,
    else 0.0."""
    found = _first(item, 2)
    if found is None:
        return Score("scored", 0.0, note="no point of two numbers from 0 to 999")
    left, top, right, bottom = _box(item)
    x, y = found
    return Score("scored", float(left <= x <= right and top <= y <= bottom), note=f"{found}")


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); one that is turned around has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    whole = _area(one) + _area(other) - shared
    return shared / whole if whole > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _first(item: Item, count: int) -> tuple[float, ...] | None:
    text = final_answer(item.completion)
    # Qwen-VL's [x, y, x, y], and (x,y),(x,y), before any numbers that a label may hold
    together = re.search(rf"[\[(]\s{{0,8}}{NUMBER}(?:{BETWEEN}{NUMBER}){{{count - 1}}}\s{{0,8}}[\])]", text)
    values = tuple(map(float, NUMBERS.findall(together[0] if together else text)[:count]))
    return values if len(values) == count and all(0 <= value <= GRID for value in values) else None


def _box(item: Item) -> tuple[float, ...]:
    box = tuple(float(value) for value in item.columns["box"])
    if len(box) != 4:
        raise ValueError(f"column `box` has {len(box)} numbers; it must have left, top, right, bottom")
    return box
