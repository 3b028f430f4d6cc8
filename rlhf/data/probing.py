"""Rows that ask one thing of a vision-language model at a time, from the scans of `rlhf.data.digits`: the studies of
recipes/studies.toml compare models on them.

Held-out rows show held-out scans (printed digits: type), and column `category` says which kind of question a row is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rlhf.data.building import built, options_of, require_table, takes
from rlhf.data.chains import Chain, write_chain
from rlhf.data.digits import CELL, WORDS, Options, Puzzle, as_png, draw_puzzle, ink, label, picture, row_of, scans
from rlhf.data.formatters import turn
from rlhf.data.rows import DataError, Row

TASKS: Mapping[str, Callable[[int], str]] = {
    "read": str,
    "word": WORDS.__getitem__,
    "next": lambda digit: str(digit + 1),
    "double": lambda digit: str(digit + digit),
}


@dataclass(frozen=True)
class Setting:
    """yes: the share of questions whose answer is yes; canvas: pixels a side of a large picture, ink: of a digit on it;
    shots: how many examples precede a question, in turn; digits: of a picture."""

    yes: float = 0.5
    canvas: int = 192
    ink: int = 22
    shots: tuple[int, ...] = (0, 1, 2, 3, 4)
    digits: int = 3


def build(table: str, rows: int, split: str, seed: int, options: Mapping[str, Any]) -> list[Row]:
    """`rows` rows of one table, the same for the same arguments.

    presence  is there a seven among the digits? categories present and absent
    canvas    one small digit in some cell of a large dark picture: read it (category read), or is it a seven? (present,
              absent)
    shots     what is to be said of a digit is shown by examples alone: its name, its double, …; categories "N shots"
    styles    every question of digits, answered in a box (short) or with a chain (long); column style says how
    printed   every question of digits, about printed digits

    Raises DataError for an unknown table or option.
    """
    makers: dict[str, Callable[[random.Random, Setting, str, int], Row]] = {
        "presence": _presence,
        "canvas": _canvas,
        "shots": _shots,
        "styles": _styles,
        "printed": _printed,
    }
    require_table("probing", makers, table, split)
    setting = options_of("probing", Setting, options)
    if not (0 <= setting.yes <= 1 and 1 <= setting.digits <= 4 and 8 <= setting.ink <= CELL <= setting.canvas):
        raise DataError(f"{setting}: yes is a share, digits from 1 to 4, ink from 8 to {CELL}, canvas at least {CELL}")
    if not setting.shots or min(setting.shots) < 0:
        raise DataError(f"shots = {list(setting.shots)} must be a list of numbers of examples, none below 0")
    return built("probing", makers, table, rows, split, seed, setting)


def _some(rng: random.Random, split: str, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Scans, and the digits that they show."""
    found = tuple(rng.sample(scans(split), count))
    return found, tuple(map(label, found))


def _asked(category: str, question: str, answer: str, shot: bytes, shown: tuple[int, ...], **more: Any) -> Row:
    return {
        "messages": [turn("user", question, 1), turn("assistant", answer)],
        "images": [{"bytes": shot, "path": None}],
        "answer": answer,
        "category": category,
        "question": question,
        "digits": list(shown),
        "think": False,
        **more,
    }


def _wanted(rng: random.Random, setting: Setting, place: int, shown: tuple[int, ...]) -> tuple[str, int]:
    """Category, and the digit to ask for."""
    others = [digit for digit in range(10) if digit not in shown]
    return ("present", rng.choice(shown)) if takes(place, setting.yes) else ("absent", rng.choice(others))


def _is_there_a(digit: int) -> str:
    return f"is there {'an' if WORDS[digit] == 'eight' else 'a'} {WORDS[digit]}?"


def _presence(rng: random.Random, setting: Setting, split: str, place: int) -> Row:
    found, shown = _some(rng, split, setting.digits)
    category, wanted = _wanted(rng, setting, place, shown)
    answer = "yes" if category == "present" else "no"
    return _asked(category, _is_there_a(wanted), answer, picture(found, rng, split), shown)


def _canvas(rng: random.Random, setting: Setting, split: str, place: int) -> Row:
    (scan,), shown = _some(rng, split, 1)
    canvas = np.zeros((setting.canvas, setting.canvas), dtype=np.uint8)
    y, x = (rng.randrange(setting.canvas // CELL) * CELL + rng.randint(0, CELL - setting.ink) for _ in range(2))
    canvas[y : y + setting.ink, x : x + setting.ink] = ink(scan, setting.ink)
    if place % 2 == 0:
        return _asked("read", "which digit is this?", str(shown[0]), as_png(canvas), shown)
    category, wanted = _wanted(rng, setting, place // 2, shown)
    answer = "yes" if category == "present" else "no"
    return _asked(category, _is_there_a(wanted), answer, as_png(canvas), shown)


def _shots(rng: random.Random, setting: Setting, split: str, place: int) -> Row:
    count = setting.shots[place % len(setting.shots)]
    found, shown = _some(rng, split, count + 1)
    task = rng.choice(list(TASKS))
    messages = list[Row]()
    for digit in shown:
        messages += [turn("user", "?", 1), turn("assistant", TASKS[task](digit))]
    pictures = [picture((scan,), rng, split) for scan in found]
    row = _asked(f"{count} shots", "?", TASKS[task](shown[-1]), pictures[-1], shown, task=task)
    return row | {"messages": messages, "images": [{"bytes": shot, "path": None} for shot in pictures]}


def _styles(rng: random.Random, setting: Setting, split: str, place: int) -> Row:  # noqa: ARG001
    puzzle = draw_puzzle(rng, Options(), split)
    style = "short" if place % 2 == 0 else "long"
    chain = write_chain(Chain(puzzle.category, puzzle.digits, puzzle.target), rng)
    reply = f"\\boxed{{{puzzle.answer}}}" if style == "short" else chain
    shown = picture(puzzle.scans, rng, split)
    # the style is what is asked for here, not the mode of a thinking model
    return row_of(puzzle, puzzle.question, reply, False, shown) | {"style": style, "category": style}


def _printed(rng: random.Random, setting: Setting, split: str, place: int) -> Row:  # noqa: ARG001
    puzzle = draw_puzzle(rng, Options(), split)
    return row_of(puzzle, puzzle.question, f"\\boxed{{{puzzle.answer}}}", False, print_digits(puzzle, rng))


def print_digits(puzzle: Puzzle, rng: random.Random) -> bytes:
    """A picture like those of scans, its digits in type of 13 to 19 pixels."""
    canvas = Image.new("L", (2 * CELL, 2 * CELL))
    pen = ImageDraw.Draw(canvas)
    for place, digit in enumerate(puzzle.digits):
        font = ImageFont.load_default(rng.uniform(16, 22))
        left, top, right, bottom = pen.textbbox((0, 0), str(digit), font)
        row, column = divmod(place, 2)
        x = column * CELL + rng.uniform(1, CELL - 1 - (right - left)) - left
        y = row * CELL + rng.uniform(1, CELL - 1 - (bottom - top)) - top
        pen.text((x, y), str(digit), fill=rng.randint(180, 255), font=font)
    return as_png(np.asarray(canvas))
