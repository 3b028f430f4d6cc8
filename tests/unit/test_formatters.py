"""Conversations made of other columns, and what of them is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.digits import build
from rlhf.data.formatters import FORMATTERS, formatted
from rlhf.data.formatters.regions import spelt
from rlhf.data.formatting import as_sample
from rlhf.data.rows import DataError, Row, Rows, read
from rlhf.data.sources import open_source
from rlhf.data.tokenizer import train_tokenizer
from rlhf.plan import PlanError, check
from rlhf.recipe import Chat, Source, load
from tests.unit.test_data_formatting import Doubling, learned


def rows(tmp_path: Path, *written: Row) -> Rows:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return read(path)


@pytest.fixture(scope="module")
def pictures() -> list[str]:
    """Real pictures, encoded."""
    import base64

    made = build("single", 4, "train", 0, {})
    return [base64.b64encode(row["images"][0]["bytes"]).decode() for row in made]


def spoken(row: Row) -> list[tuple[str, str]]:
    """Role and words of each message, pictures as #."""
    return [
        (m["role"], "".join("#" if part["type"] == "image" else part["text"] for part in m["content"]))
        for m in row["messages"]
    ]


def form(tmp_path: Path, table: dict[str, Any], *written: Row) -> list[Row]:
    return list(formatted(rows(tmp_path, *written), table))


def test_captions(tmp_path: Path, pictures: list[str]) -> None:
    given = [{"image": pictures[0], "caption": "a three", "source": "cc"}, {"image": pictures[1], "caption": "a five"}]
    plain = form(tmp_path, {"type": "caption"}, *given)
    assert [spoken(row) for row in plain] == [
        [("user", "#"), ("assistant", "a three")],
        [("user", "#"), ("assistant", "a five")],
    ]
    assert plain[0]["source"] == "cc"
    assert len(plain[0]["images"]) == 1
    prompts = ["Describe it.", "What is it?"]
    many = [{"image": pictures[0], "caption": f"number {i}"} for i in range(40)]
    asked = [spoken(row)[0][1] for row in form(tmp_path, {"type": "caption", "prompts": prompts}, *many)]
    assert set(asked) == {"#Describe it.", "#What is it?"}
    assert asked == [spoken(row)[0][1] for row in form(tmp_path, {"type": "caption", "prompts": prompts}, *many)]


def test_words_in_a_picture(tmp_path: Path, pictures: list[str]) -> None:
    (found,) = form(tmp_path, {"type": "ocr_list", "prompts": ["Read."]}, {"image": pictures[0], "words": ["no", "3"]})
    assert spoken(found) == [("user", "#Read."), ("assistant", "no 3")]


def test_an_interleaved_page(tmp_path: Path, pictures: list[str]) -> None:
    page = {
        "texts": ["A page.", None, "One here.", "And more.", None, "  ", None, "Two at once.", None, ""],
        "images": [None, pictures[0], None, None, pictures[1], None, pictures[2], None, pictures[3], None],
    }
    (found,) = form(tmp_path, {"type": "interleaved"}, page)
    assert spoken(found) == [
        ("user", "A page.#"),
        ("assistant", "One here. And more."),
        ("user", "##"),
        ("assistant", "Two at once."),
    ]
    assert len(found["images"]) == 3  # the last has no words after it
    (short,) = form(tmp_path, {"type": "interleaved", "most": 1}, page)
    assert spoken(short) == [("user", "A page.#"), ("assistant", "One here. And more.")]
    assert len(short["images"]) == 1


def test_examples_before_a_question(tmp_path: Path, pictures: list[str]) -> None:
    given = [
        {"id": "a", "instruction": "which?", "answer": "three", "images": [pictures[0]]},
        {"id": "b", "instruction": "and this?", "answer": "five", "images": [pictures[1], pictures[2]]},
        {"id": "c", "instruction": "now?", "answer": "eight", "images": [pictures[3]], "related": ["b", "a"]},
    ]
    found = form(tmp_path, {"type": "in_context"}, *given)[2]
    assert spoken(found) == [
        ("user", "##and this?"),
        ("assistant", "five"),
        ("user", "#which?"),
        ("assistant", "three"),
        ("user", "#now?"),
        ("assistant", "eight"),
    ]
    assert found["answer"] == "eight"
    tokenizer = train_tokenizer(["which? three five eight"] * 20, 300, Chat())
    sample = as_sample(found, "s", 0, Doubling(tokenizer), None, Chat(supervise="all"))
    assert learned(sample, tokenizer) == ["five<eos>", "three<eos>", "eight<eos>"]
    with pytest.raises(DataError, match=r"rows.jsonl, row 0: no row has the id 'z'"):
        form(tmp_path, {"type": "in_context"}, given[2] | {"related": ["z"]})


def test_how_an_answer_is_asked_for(tmp_path: Path) -> None:
    def row(kind: str) -> Row:
        return {"kind": kind, "messages": [{"role": "user", "content": "sum?"}, {"role": "assistant", "content": "8"}]}

    found = form(tmp_path, {"type": "response_format"}, row("short"), row("choice"), row("free"))
    asked = [
        m["content"] if isinstance(m["content"], str) else spoken({"messages": [m]})[0][1]
        for m in (one["messages"][0] for one in found)
    ]
    assert asked == [
        "sum?\nAnswer the question using a single word or phrase.",
        "sum?\nAnswer with the option's letter from the given choices directly.",
        "sum?",
    ]


def test_boxes_on_a_grid(tmp_path: Path, pictures: list[str]) -> None:
    assert spelt((0, 0, 640, 480), (640, 480), "bracket") == "[000, 000, 999, 999]"
    assert spelt((64, 48, 320, 120), (640, 480), "bracket") == "[100, 100, 500, 250]"
    region = {"name": "cat", "box": [64, 48, 320, 120]}
    given = {"image": pictures[0], "width": 640, "height": 480, "regions": [region, region | {"name": "dog"}]}
    (found,) = form(tmp_path, {"type": "regions"}, given)
    assert spoken(found) == [
        ("user", "#Where is the cat?"),
        ("assistant", "[100, 100, 500, 250]"),
        ("user", "Where is the dog?"),
        ("assistant", "[100, 100, 500, 250]"),
    ]
    (tags,) = form(tmp_path, {"type": "regions", "style": "tags"}, given)
    assert spoken(tags)[1] == ("assistant", "<ref>cat</ref><box>(100,100),(500,250)</box>")


def test_frames_of_a_video(tmp_path: Path, pictures: list[str]) -> None:
    given = {"frames": [pictures[i % 4] for i in range(10)], "instruction": "what?", "answer": "digits"}
    (found,) = form(tmp_path, {"type": "frames", "most": 4}, given)
    assert spoken(found) == [("user", "####what?"), ("assistant", "digits")]
    (every,) = form(tmp_path, {"type": "frames"}, given)
    kept = [every["images"].index(frame) for frame in found["images"]]
    assert len(every["images"]) == 10
    assert len(kept) == 4


def test_captions_to_draw(tmp_path: Path) -> None:
    (found,) = form(tmp_path, {"type": "signals", "tokens": ["[I0]", "[I1]"]}, {"caption": "a cat", "image": "x"})
    assert spoken(found) == [("user", "Draw: a cat"), ("assistant", "[I0][I1]")]
    assert (found["signal"], found["images"]) == ("a cat", [])


WRONG: list[tuple[dict[str, Any], Row, str]] = [
    ({"type": "caption"}, {"image": "x"}, "column 'caption' must be a str"),
    ({"type": "ocr_list"}, {"image": "x", "words": []}, "column 'words' must be a list of words"),
    ({"type": "interleaved"}, {"texts": ["a"], "images": []}, "have 1 and 0 places"),
    ({"type": "interleaved"}, {"texts": ["a", None], "images": [None, "x"]}, "no words follow a picture"),
    ({"type": "in_context"}, {"answer": "x"}, "column 'instruction' must be a str"),
    ({"type": "regions"}, {"width": 4, "height": 4, "regions": [{"name": "a"}]}, "a region is"),
    ({"type": "regions"}, {"width": 4, "height": 4, "regions": []}, "'regions' is empty"),
    ({"type": "regions"}, {"width": 0, "height": 4, "regions": [{"name": "a", "box": [0, 0, 1, 1]}]}, "ZeroDivision"),
    ({"type": "regions"}, {"width": 4, "height": 4, "regions": ["a"]}, "AttributeError"),
    ({"type": "response_format"}, {"kind": "short", "messages": [{"content": "a"}]}, "KeyError: 'role'"),
    ({"type": "frames"}, {"frames": [], "instruction": "a", "answer": "b"}, "'frames' is empty"),
]


@pytest.mark.parametrize(("table", "row", "says"), WRONG)
def test_a_row_that_cannot_be_formed_is_named(table: dict[str, Any], row: Row, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl, row 0: .*{says}"):
        form(tmp_path, table, row)


@pytest.mark.parametrize(
    "table",
    [
        {"type": "caption", "prompts": "Describe it."},
        {"type": "ocr_list", "prompts": []},
        {"type": "signals", "tokens": []},
        {"type": "frames", "most": 0},
        {"type": "interleaved", "most": 0},
    ],
)
def test_settings_that_would_leave_nothing_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"format\.[a-z_]+ [a-z]+ must be"):
        FORMATTERS.make(table)


def test_a_source_has_a_format_and_then_selects(tmp_path: Path, pictures: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"image": pictures[0], "caption": f"{i}"}) + "\n" for i in range(9)))
    source = Source(path=str(path), format={"type": "caption"}, select=[{"type": "cap", "rows": 3}])
    found = open_source("a", source, 0, tmp_path)
    assert len(found) == 3
    assert all(spoken(row)[0] == ("user", "#") for row in found)
    other = open_source("a", source.model_copy(update={"format": {"type": "caption", "prompts": ("?",)}}), 0, tmp_path)
    assert other.digest != found.digest
    recipe = Path(__file__).parents[2] / "recipes" / "think_fusion_digits.toml"
    with pytest.raises(PlanError, match=r"data.text.format: unknown formatter type 'captions'"):
        check(load([recipe], ["data.text.format = { type = 'captions' }"]))
    assert set(FORMATTERS.types()) == {
        *("caption", "frames", "in_context", "interleaved", "ocr_list", "regions", "response_format", "signals"),
    }
