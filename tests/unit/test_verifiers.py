"""Verifiers, by hand-made cases: what is right, what is nearly right, and what only looks it."""

from __future__ import annotations

import random
import time

import pytest

from rewards import format as form
from rewards import grounding, number, text
from rewards.answer import final_answer
from rewards.base import Item
from rlhf.types import Prompt


def item(completion: str, question: str = "what?", **columns: object) -> Item:
    return Item(Prompt("s/0", "s", question, (1,), (), False, columns), completion, (1, 2), True)


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("<think>\\boxed{3}</think> so \\boxed{8}", "8"),
        ("<think>it is 3</think> 8 apples", "8 apples"),
        ("<think>a</think><answer> 8 </answer>", "8"),
        ("I think so. Answer: 8", "8"),
        ("the answer is a cat", "a cat"),
        ("答案是：猫", "猫"),
        ("8", "8"),
        ("**Answer:** 5", "5"),
        ("**Answer: 5**", "5"),
        ("<think>\\boxed{3}</think> so \\boxed{5}", "5"),
        ("", ""),
    ],
)
def test_what_is_said_in_the_end(completion: str, said: str) -> None:
    assert final_answer(completion) == said


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("3.14159", "3.1416", 1.0),
        ("3.2", "3.1416", 0.0),
        ("1,234", "1234", 1.0),
        ("3/4", "0.75", 1.0),
        ("1/0", "1", 0.0),
        ("2e3", "2000", 1.0),
        ("−5", "-5", 1.0),
        ("1.5 km", "1500 m", 1.0),
        ("1.5 km", "1500", 0.0),
        ("1500", "1500 m", 1.0),
        ("1.5 kg", "1500 m", 0.0),
        ("9.81 m/s^2", "9.81 m/s**2", 1.0),
        ("36 km/h", "10 m/s", 1.0),
        ("20 °C", "293.15 K", 1.0),
        ("8 apples", "8 Apples", 1.0),
        ("8 apples", "8 pears", 0.0),
        ("12 %", "0.12", 1.0),
        ("12%", "12", 1.0),
        ("12%", "13", 0.0),
        ("12 percent", "0.12", 1.0),
        ("$12\\%$", "12 %", 1.0),
        ("5\\text{ cm}", "50 mm", 1.0),
        ("5\\,\\mathrm{cm}^{2}", "5 cm²", 1.0),
        ("5 m", "5 m²", 0.0),
        ("90^\\circ", "90", 1.0),
        ("90°", "90 degrees", 1.0),
        ("5 μm", "0.005 mm", 1.0),
        ("5 KM", "5000 Meters", 1.0),
        ("5 MW", "5 mW", 0.0),
        ("3 \\times 10^{5} m", "300 km", 1.0),
        ("3 × 10⁵", "300000", 1.0),
        ("\\frac{3}{4}", "0.75", 1.0),
        ("-\\frac{3}{4}", "-0.75", 1.0),
        ("2 m s⁻¹", "2 m/s", 1.0),
        ("eight", "8", 0.0),
        ("8 or 9", "8", 0.0),
        ("9" * 5000, "9", 0.0),
    ],
)
def test_numbers_with_units(said: str, answer: str, right: float) -> None:
    assert number.close(item(f"\\boxed{{{said}}}", answer=answer)).value == right


def test_a_row_without_a_number_is_no_wrong_answer() -> None:
    assert number.close(item("8", answer="a cat")).outcome == "failed"


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("104", "100", 1.0),
        ("106", "100", 0.0),
        ("-104", "100", 0.0),
        ("0.1", "0", 0.0),
        ("Blue", "blue", 1.0),
        ("blue, 104", "Blue, 100", 1.0),
        ("blue", "blue, 100", 0.0),
        ("10.4%", "10%", 1.0),
    ],
)
def test_charts(said: str, answer: str, right: float) -> None:
    assert number.relaxed(item(said, answer=answer)).value == right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        *[("there are three", 1.0), ("3", 1.0), ("two, no, three", 1.0), ("三", 1.0), ("four", 0.0), ("none", 0.0)],
        *[("3.0", 1.0), ("1,003", 0.0), ("十三", 0.0), ("twenty-three", 0.0), ("-3", 0.0), ("3.5", 0.0)],
    ],
)
def test_counting(said: str, right: float) -> None:
    assert number.count(item(said, answer=3)).value == right
    assert number.count(item("4", answer="3"), slack=1).value == 1.0


def test_boxes() -> None:
    box = [100, 100, 300, 300]
    assert grounding.iou(item("it is at [100, 100, 300, 300].", box=box)).value == 1.0
    assert grounding.iou(item("<ref>2 cats</ref><box>(200,100),(400,300)</box>", box=box)).value == pytest.approx(1 / 3)
    for said in (
        '```json\n{"bbox_2d": [100, 100, 300, 300], "label": "2"}\n```',
        "Object 1: [100,100,300,300]",
        "100, 100, 300, 300.",
        "(100,100),(300,300)",
    ):
        assert grounding.iou(item(said, box=box)).value == 1.0, said
    assert grounding.point(item('{"point_2d": [200, 300]}', box=box)).value == 1.0
    for said in ("[300, 300, 100, 100]", "[100, 100, 300]", "[100, 100, 1300, 300]", "there", "[500, 500, 600, 600]"):
        assert grounding.iou(item(said, box=box)).value == 0.0
    assert grounding.iou(item("[100, 100, 300, 200]", box=box), at=0.5).value == 1.0
    assert grounding.iou(item("[100, 100, 300, 199]", box=box), at=0.5).value == 0.0
    assert grounding.point(item("(200, 300)", box=box)).value == 1.0
    assert grounding.point(item("(200, 301)", box=box)).value == 0.0


def test_overlap_is_that_of_counted_cells() -> None:
    rng = random.Random(0)
    for _ in range(50):
        one, other = (
            (*sorted(rng.sample(range(12), 2)), *sorted(rng.sample(range(12), 2))) for _ in range(2)
        )  # left, right, top, bottom
        cells = [
            {(x, y) for x in range(left, right) for y in range(top, bottom)}
            for left, right, top, bottom in (one, other)
        ]
        expected = len(cells[0] & cells[1]) / len(cells[0] | cells[1])
        boxes = [(left, top, right, bottom) for left, right, top, bottom in (one, other)]
        assert grounding.overlap(*boxes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("The Cat.", "cat", 1.0),
        ("ｃａｔ", "cat", 1.0),
        ("猫。", "猫", 1.0),
        ("a dog", "cat", 0.0),
        ("red， blue", "red, blue", 1.0),
        ("红、蓝", "红，蓝", 1.0),
        ("blue, red", "red, blue", 0.0),
        ("dog", ["cat", "dog"], 1.0),
    ],
)
def test_equal_words(said: str, answer: object, right: float) -> None:
    assert text.equal(item(said, answer=answer)).value == right
    assert text.equal(item("blue, red", answer="red, blue"), ordered=False).value == 1.0


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("B", True),
        ("(b)", True),
        ("b", True),
        ("B. a dog", True),
        ("\\boxed{B}", True),
        ("选B", True),
        ("a dog", True),
        ("The answer is B", True),
        ("A", False),
        ("A or B", False),
        ("A cat? no, B", True),
        ("", False),
        ("BAD", False),
        ("I choose B", True),
        ("B: I think", True),
        ("**B**", True),
        ("A dog is shown", False),
    ],
)
def test_choices(said: str, chosen: bool) -> None:
    assert text.choice(item(said, answer="B", choices=["a cat", "a dog", "a cow"])).value == float(chosen)


def test_what_a_row_says_is_right_must_be_a_choice() -> None:
    for truth in ("(B)", "B.", "b", "a dog"):
        assert text.choice(item("B", answer=truth, choices=["a cat", "a dog"])).value == 1.0
    assert text.choice(item("B", answer="D", choices=["a cat", "a dog"])).outcome == "failed"


def test_likeness_of_read_text() -> None:
    assert text.anls(item("Hello  World", answer="hello world")).value == 1.0
    assert text.anls(item("helo", answer=["hello", "x"])).value == pytest.approx(0.8)
    assert text.anls(item("hxxxx", answer="hello")).value == 0.0


def test_languages() -> None:
    assert text.language(item("it is eight", "how many?")).value == 1.0
    assert text.language(item("是八", "how many?")).value == 0.0
    assert text.language(item("答案是八 \\boxed{eight} $x + y$", "有几个?")).value == 1.0
    assert text.language(item("八 of them and more", "有几个?")).value == 0.0
    assert text.language(item("8", "有几个?")).value == 1.0
    assert text.language(item("それは猫です", "?"), wanted="ja").value == 1.0
    assert text.language(item("それは猫です。名前は小百合です", "猫はどこですか?")).value == 1.0
    assert text.language(item("这是一只猫", "猫はどこですか?")).value == 0.0  # Chinese, whatever the characters
    assert text.language(item("это восемь", "how many?")).value == 0.0
    assert text.language(item("นี่คือแมว", "how many?")).value == 0.0  # a script that nobody asked for
    assert text.language(item("$这是八$ it is", "how many?")).value == 0.0  # dollars hide nothing
    assert text.language(item("是八", "12 + 3 = ?")).value == 1.0  # a question in no language
    assert text.language(item("\\frac{a}{b} 是 $x$", "求 \\frac{a}{b}")).value == 1.0
    with pytest.raises(ValueError, match="'tlh' is none of en"):
        text.language(item("nuqneH"), wanted="tlh")


def test_repetition() -> None:
    assert text.repetition(item("one two three four five six")).value == 1.0
    assert text.repetition(item("so it is " * 200)).value < 0.01
    assert text.repetition(item("")).value == 1.0
    assert text.repetition(item("是的是的是的是的是的是的")).value < 0.3


def test_json() -> None:
    wanted = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    assert text.schema(item('so:\n```json\n{"n": 3}\n```', schema=wanted)).value == 1.0
    assert text.schema(item('{"n": 3}'), of=wanted).value == 1.0
    wrong = text.schema(item('{"n": "3"}', schema=wanted))
    assert (wrong.value, "$.n" in wrong.note) == (0.0, True)
    assert text.schema(item('<think>{"n": "a"}</think>{"n": 3, "why": "the answer is 3"}', schema=wanted)).value == 1.0
    assert text.schema(item('the answer is {"n": 3}', schema=wanted)).value == 1.0
    assert text.schema(item("three", schema=wanted)).value == 0.0
    assert text.schema(item("[" * 5000, schema=wanted)).value == 0.0


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("<judge>it is easy</judge><think>\n\n</think>\\boxed{3}", 1.0),
        ("<judge>it is hard</judge>\n<think>one, two</think>\nso \\boxed{3}.", 1.0),
        ("<judge> </judge><think>one</think>\\boxed{3}", 0.0),
        ("<think>one</think>\\boxed{3}", 0.0),
        ("<think>one</think><judge>a</judge>\\boxed{3}", 0.0),
        ("<judge>a</judge><think>one</think>3", 0.0),
        ("<judge>a</judge><judge>b</judge><think>one</think>\\boxed{3}", 0.0),
        ("<judge>a</judge><think>one</think>\\boxed{3} and more", 0.0),
    ],
)
def test_the_form_of_judged_thinking(completion: str, right: float) -> None:
    assert form.judge_think(item(completion)).value == right


def test_hostile_completions_take_no_time() -> None:
    """Nothing here looks at a character more than a few times."""
    hostile = ["9" * 200_000, "a " * 100_000, "(" * 100_000, "<think>" * 30_000, "\\boxed{" * 30_000, "1,2;" * 50_000]
    rows = {"answer": "8", "choices": list("12345678"), "box": [0, 0, 9, 9], "schema": {"type": "object"}}
    functions = [number.close, number.relaxed, number.count, grounding.iou, grounding.point, text.equal, text.choice]
    functions += [text.anls, text.language, text.repetition, text.schema, form.judge_think, form.think]
    begun = time.process_time()
    for said in hostile:
        for function in functions:
            assert function(item(said, **rows)).outcome == "scored"
    assert time.process_time() - begun < 60
