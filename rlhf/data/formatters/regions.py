"""Where things are, in words: boxes on a grid of 0 to 999 (CogVLM 2311.03079, Qwen-VL 2308.12966)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf.data.formatters import FORMATTERS, Find, column, pictures, turn, without
from rlhf.data.rows import DataError, Row
from rlhf.slots import one_of

STYLES = ("bracket", "tags")
GRID = 1000


def spelt(box: Sequence[float], size: tuple[int, int], style: str, name: str = "") -> str:
    """A box (left, top, right, bottom) in pixels of a picture of `size` = (width, height), in words."""
    sides = [side for _ in range(2) for side in size]
    places = [min(GRID - 1, max(0, int(GRID * value / side))) for value, side in zip(box, sides, strict=True)]
    if style == "bracket":
        return "[" + ", ".join(f"{place:03d}" for place in places) + "]"
    left, top, right, bottom = places
    return f"<ref>{name}</ref><box>({left},{top}),({right},{bottom})</box>"


@FORMATTERS.register
@dataclass(frozen=True)
class Regions:
    """Columns `regions`, a list of {name, box} with boxes (left, top, right, bottom) in pixels, and the picture's
    `width` and `height`: of each it is asked where it is. `style`: "bracket" (CogVLM) or "tags" (Qwen-VL)."""

    type: ClassVar[str] = "regions"
    style: str = "bracket"
    prompt: str = "Where is the {name}?"

    def __post_init__(self) -> None:
        one_of("format.regions style", self.style, STYLES)

    def form(self, row: Row, find: Find) -> Row:  # noqa: ARG002
        size, shown = (column(row, "width", int), column(row, "height", int)), pictures(row)
        messages = list[Row]()
        for region in column(row, "regions", list):
            name, box = region.get("name"), region.get("box")
            if not isinstance(name, str) or not isinstance(box, list | tuple) or len(box) != 4:
                raise DataError(f"a region is {{name, box: [left, top, right, bottom]}}, this one is {region!r}")
            asked = self.prompt.replace("{name}", name)
            messages.append(turn("user", asked, 0 if messages else len(shown)))
            messages.append(turn("assistant", spelt(box, size, self.style, name)))
        if not messages:
            raise DataError("column 'regions' is empty; leave the row out")
        return without(row, "regions") | {"images": shown, "messages": messages}
