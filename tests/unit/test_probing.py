"""Rows that ask one thing at a time: their truth, their balance, and that held-out scans stay out of training."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from rlhf.data import digits, probing
from rlhf.data.digits import WORDS, ink, scans
from rlhf.data.probing import TASKS, build
from rlhf.data.rows import DataError, Row

TABLES = ("presence", "canvas", "shots", "styles", "printed")


def asked(row: Row) -> str:
    return str(row["messages"][-2]["content"][-1]["text"])


def told(row: Row) -> str:
    return str(row["messages"][-1]["content"][0]["text"])


def pixels(row: Row, place: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["images"][place]["bytes"])))


@pytest.mark.parametrize("table", TABLES)
def test_same_arguments_same_rows(table: str) -> None:
    rows = build(table, 12, "train", 3, {})
    assert rows == build(table, 12, "train", 3, {})
    assert rows != build(table, 12, "train", 4, {})
    for row in rows:
        marks = sum(part["type"] == "image" for message in row["messages"] for part in message["content"])
        assert marks == len(row["images"]) > 0


@pytest.mark.parametrize(("share", "yes"), [(0.5, 100), (0.9, 180), (0.0, 0)])
def test_presence_is_true_and_as_often_as_asked(share: float, yes: int) -> None:
    rows = build("presence", 200, "heldout", 0, {"yes": share, "digits": 2})
    for row in rows:
        wanted = next(digit for digit, word in enumerate(WORDS) if f" {word}?" in asked(row))
        assert told(row) == ("yes" if wanted in row["digits"] else "no")
        assert row["category"] == ("present" if wanted in row["digits"] else "absent")
    assert sum(told(row) == "yes" for row in rows) == yes


def test_a_canvas_has_one_small_digit_anywhere() -> None:
    rows = build("canvas", 80, "heldout", 0, {"canvas": 96, "ink": 16})
    assert Counter(row["category"] for row in rows) == {"read": 40, "present": 20, "absent": 20}
    corners = set()
    for row in rows:
        grey = pixels(row)[..., 0]
        assert grey.shape == (96, 96)
        y, x = grey.nonzero()
        assert 0 < np.ptp(y) < 16
        assert 0 < np.ptp(x) < 16
        corners.add((y.min() // 48, x.min() // 48))
        if row["category"] == "read":
            assert told(row) == str(row["digits"][0])
    assert len(corners) == 4


def test_shots_show_one_task_each_and_turn_about() -> None:
    rows = build("shots", 90, "train", 0, {"shots": [0, 2, 4]})
    assert Counter(row["category"] for row in rows) == {"0 shots": 30, "2 shots": 30, "4 shots": 30}
    assert {row["task"] for row in rows} == set(TASKS)
    for row in rows:
        said = [m["content"][0]["text"] for m in row["messages"] if m["role"] == "assistant"]
        assert said == [TASKS[row["task"]](digit) for digit in row["digits"]]


def test_styles_are_halves_of_short_and_long() -> None:
    rows = build("styles", 50, "train", 0, {})
    assert Counter(row["style"] for row in rows) == {"short": 25, "long": 25}
    assert all(("<think>" in told(row)) == (row["style"] == "long") for row in rows)
    assert all(told(row).endswith(f"\\boxed{{{row['answer']}}}") and not row["think"] for row in rows)


def test_printed_digits_fill_their_cells_and_no_other() -> None:
    for row in build("printed", 60, "heldout", 0, {}):
        grey = pixels(row)[..., 0]
        filled = [bool(grey[y : y + 24, x : x + 24].any()) for y in (0, 24) for x in (0, 24)]
        assert filled == [place < len(row["digits"]) for place in range(4)]


@pytest.mark.parametrize("table", ["presence", "canvas", "shots", "styles"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pictures_are_made_of_the_scans_of_their_split(table: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = set[int]()

    def spied(index: int, *how: float) -> object:
        drawn.add(index)
        return ink(index, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(digits, "ink", spied)
    monkeypatch.setattr(probing, "ink", spied)
    build(table, 60, split, 0, {})
    assert drawn
    assert drawn <= set(scans(split))


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        ("nothing", {}, "no table 'nothing'"),
        ("canvas", {"inks": 3}, "no option 'inks'"),
        ("canvas", {"ink": 300}, "ink from 8 to 24"),
        ("presence", {"yes": 2.0}, "yes is a share"),
        ("shots", {"shots": []}, "must be a list of numbers"),
    ],
)
def test_what_it_cannot_make_is_refused(table: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        build(table, 4, "train", 0, options)
