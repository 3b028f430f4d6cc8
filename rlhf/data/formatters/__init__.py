"""Formatters turn what a row's columns hold into a conversation, before anything else sees it; a recipe names one.

A new formatter is one new module here, or a class in one: a frozen dataclass with a class attribute `type`, decorated
`@FORMATTERS.register`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from rlhf.data.rows import DataError, Row, Rows
from rlhf.slots import Slot

Find = Callable[[str], Row]  # another row of the source, as it is written, by its column `id`


class Formatter(Protocol):
    """What every formatter offers."""

    type: ClassVar[str]

    def form(self, row: Row, find: Find) -> Row:
        """The row with `messages` and `images` made of other columns. Raises DataError naming a column that is not as
        it should be; who calls adds where the row lies."""


FORMATTERS: Slot[Formatter] = Slot("formatter", __name__)


def formatted(rows: Rows, table: Mapping[str, Any] | None) -> Rows:
    """The rows as a formatter makes them; as they are without one."""
    return rows if table is None else rows.formed(FORMATTERS.make(table).form)


def column(row: Row, name: str, kind: type, default: Any = None) -> Any:
    """The value of a column. Raises DataError where it is missing, unless there is a default, or of another kind."""
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        raise DataError(f"column {name!r} must be a {kind.__name__}, and is {value!r}")
    return value


def wordings(what: str, value: object) -> tuple[str, ...]:
    """Several wordings of one thing. Raises ValueError unless it is a list of words that is not empty."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f"format.{what} must be a list of words, not empty, and is {value!r}")
    return tuple(value)


def turn(role: str, text: str = "", images: int = 0) -> Row:
    """A message with so many pictures before its text."""
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def pictures(row: Row) -> list[Any]:
    """The row's pictures, of column `images` or `image`."""
    single, several = row.get("image"), row.get("images")
    return list(several) if several else [] if single is None else [single]


def without(row: Row, *names: str) -> Row:
    """The other columns."""
    return {name: value for name, value in row.items() if name not in {"image", "images", "messages", *names}}


def one_of_many(choices: tuple[str, ...], row: Row) -> str:
    """Of several wordings the one that this row gets, always the same."""
    words = {name: value for name, value in row.items() if isinstance(value, str | int | list)}
    return choices[zlib.crc32(json.dumps(words, sort_keys=True, default=str).encode()) % len(choices)]
