"""When to think: rows that are easy or hard by their picture alone, and the rewards of the choice and of the chain."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from sklearn.datasets import load_digits

from rewards import deciding
from rewards.base import Item, resolve
from rewards.base import evaluate as evaluated
from rewards.format import JUDGED, judge_think, thinks
from rlhf.data.chains import check_chain
from rlhf.data.deciding import build
from rlhf.data.digits import scans
from rlhf.data.rows import DataError
from rlhf.types import Prompt

WAVERING = {"wavering": 0.5}


def reply(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"][0]["text"])


def asked(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"][-1]["text"])


def truth(row: dict[str, Any]) -> str:
    """The answer, worked out another way than the builder does."""
    digits = sorted(str(digit) for digit in row["digits"])
    return {"sum": str(sum(map(int, digits))), "larger": digits[-1], "sorted": " ".join(digits)}[row["category"]]


@pytest.mark.parametrize("table", ["judged", "judged_text", "prompts"])
def test_tables_hold_the_truth_and_repeat_exactly(table: str) -> None:
    options = {} if table == "prompts" else WAVERING
    rows = build(table, 200, "train", 3, options)
    assert rows == build(table, 200, "train", 3, options)
    assert rows != build(table, 200, "train", 4, options)
    labels = load_digits().target
    for row in rows:
        assert row["digits"] == [labels[scan] for scan in row["scans"]]
        assert len(row["digits"]) == len(set(row["scans"])) == 4
        different = len(set(row["digits"]))
        assert different == 1 if row["complexity"] == "easy" else different >= 3
        assert row["answer"] == truth(row)
        assert row["think"]
        assert len(row["images"]) == (0 if table == "judged_text" else 1)
        assert row["messages"][-1]["role"] == ("user" if table == "prompts" else "assistant")
    assert Counter(row["complexity"] for row in rows) == {"easy": 100, "hard": 100}


@pytest.mark.parametrize("options", [{}, WAVERING, {"always": True}], ids=str)
def test_replies_judge_what_is_seen_and_do_what_they_say(options: dict[str, Any]) -> None:
    chosen: dict[str, Counter[bool]] = defaultdict(Counter)
    for row in build("judged", 2000, "train", 0, options):
        assert judge_think(item(reply(row))).value == 1.0
        parts = JUDGED.fullmatch(reply(row))
        assert parts is not None
        seen, says = parts["judge"].split(", ")
        assert seen == {"easy": "alike", "hard": "mixed"}[row["complexity"]]
        assert says == ("think." if parts["think"] else "answer.")
        assert parts["answer"] == f"\\boxed{{{row['answer']}}}"
        chain = f"<think>{parts['think']}</think>{parts['answer']}"
        if parts["think"]:
            assert check_chain(row["category"], row["digits"], chain, row["answer"]).sound
        chosen[row["complexity"]][bool(parts["think"])] += 1
    # a coin decides in half of the rows, so a quarter of the choices is wrong
    wrong = {"easy": chosen["easy"][True], "hard": chosen["hard"][False]}
    if options == {"always": True}:
        assert wrong == {"easy": 1000, "hard": 0}
    elif options:
        assert all(200 < count < 300 for count in wrong.values())
    else:
        assert wrong == {"easy": 0, "hard": 0}


def test_the_words_of_a_question_say_nothing_of_its_complexity() -> None:
    """Who knows how often each question is hard in one half of the rows guesses the other half at chance."""
    rows = build("prompts", 8000, "train", 0, {})
    hard: Counter[str] = Counter()
    for row in rows[:4000]:
        hard[asked(row)] += 1 if row["complexity"] == "hard" else -1
    guessed = [(hard[asked(row)] > 0) == (row["complexity"] == "hard") for row in rows[4000:]]
    assert len(hard) == 9
    assert sum(guessed) / len(guessed) == pytest.approx(0.5, abs=0.03)


def test_chains_are_as_long_for_easy_rows_as_for_hard_ones() -> None:
    lengths = defaultdict[str, list[int]](list)
    for row in build("judged", 2000, "train", 0, {"always": True}):
        lengths[row["complexity"]].append(len(reply(row)))
    easy, hard = (sum(lengths[kind]) / len(lengths[kind]) for kind in ("easy", "hard"))
    assert easy == pytest.approx(hard, rel=0.05)


@pytest.mark.parametrize("table", ["judged", "judged_text", "prompts"])
def test_held_out_scans_never_train(table: str) -> None:
    for split in ("train", "heldout"):
        shown = {scan for row in build(table, 200, split, 0, {}) for scan in row["scans"]}
        assert shown <= set(scans(split))


def test_what_it_does_not_have_is_named() -> None:
    with pytest.raises(DataError, match=r"deciding has no table 'judge' .did you mean 'judged'"):
        build("judge", 1, "train", 0, {})
    with pytest.raises(DataError, match=r"deciding has no option 'waver' .did you mean 'wavering'"):
        build("judged", 1, "train", 0, {"waver": 1})
    with pytest.raises(DataError, match="wavering 2: from 0 to 1"):
        build("judged", 1, "train", 0, {"wavering": 2})


def item(completion: str, **columns: Any) -> Item:
    prompt = Prompt("s/0", "s", "what is the sum?", (1,), (), True, columns)
    return Item(prompt, completion, (1, 2, 3), True)


EASY = {"complexity": "easy", "category": "sum", "digits": [2, 2], "answer": "4"}
HARD = {"complexity": "hard", "category": "sum", "digits": [3, 5], "answer": "8"}
ALIKE = "<judge>alike, think.</judge><think>i see 2 and 2. 2 + 2 = 4. so 4.</think>\\boxed{4}"
SOUND = "<judge>mixed, think.</judge><think>i see 3 and 5. 3 + 5 = 8. so 8.</think>\\boxed{8}"


@pytest.mark.parametrize(
    ("row", "completion", "judgement", "always", "thought"),
    [
        (EASY, "<judge>alike, answer.</judge><think></think>\\boxed{4}", 1, 0, 1),
        (EASY, "<judge>alike, answer.</judge><think>\n\n</think>\\boxed{4}", 1, 0, 1),
        # not to think was right, whether or not the answer is: that is the answer's reward
        (EASY, "<judge>alike, answer.</judge><think></think>\\boxed{5}", 1, 0, 1),
        (EASY, ALIKE, 0, 1, 1),
        (EASY, ALIKE.replace("2 + 2 = 4", "2 + 2 = 5"), 0, 1, 0),
        (HARD, SOUND, 1, 1, 1),
        (HARD, SOUND.replace("3 + 5 = 8", "3 + 5 = 9"), 1, 1, 0),
        (HARD, SOUND.replace("i see 3", "i see 4"), 1, 1, 0),
        (HARD, "<judge>mixed, answer.</judge><think></think>\\boxed{8}", 0, 0, 0),
        # what is done counts, not what is said
        (HARD, SOUND.replace("mixed, think", "alike, answer"), 1, 1, 1),
        (HARD, "<judge>mixed, think.</judge><think> </think>\\boxed{8}", 0, 0, 0),
        (HARD, SOUND.partition("</judge>")[2], 0, 0, 0),
        (EASY, "\\boxed{4}", 0, 0, 0),
        (EASY, "", 0, 0, 0),
    ],
)
def test_the_choice_and_the_chain(
    row: dict[str, Any], completion: str, judgement: float, always: float, thought: float
) -> None:
    given = item(completion, **row)
    assert deciding.judgement(given).value == judgement
    assert deciding.judgement(given, always=True).value == always
    assert deciding.thought(given).value == thought
    for score in (deciding.judgement(given), deciding.thought(given)):
        assert (score.value == 1.0) == (not score.note)


def test_another_verifier_sees_the_chain_without_its_judgement() -> None:
    """As form, whose thinking form has no judgement before it."""
    assert deciding.thought(item(SOUND, **HARD), soundness="rewards.format:think").value == 1.0
    assert deciding.thought(item(SOUND.replace("8}", "}"), **HARD), soundness="rewards.format:think").value == 0.0


@pytest.mark.parametrize("function", ["judgement", "thought"])
def test_a_row_without_a_complexity_is_a_failure_and_no_zero(function: str) -> None:
    reward = resolve(f"rewards.deciding:{function}")
    rows = [{**HARD, "complexity": "medium"}, {key: value for key, value in HARD.items() if key != "complexity"}]
    for row in rows:
        (score,) = evaluated(reward, [item(SOUND, **row)])
        assert (score.outcome, score.value) == ("failed", None)
        assert "complexity" in score.note


@pytest.mark.parametrize(
    ("completion", "thinking"),
    [
        (SOUND, True),
        ("<think>i see", True),
        ("i see </think>\\boxed{8}", True),
        ("<judge>alike.</judge><think></think>\\boxed{4}", False),
        ("<judge>alike.</judge><think> \n</think>\\boxed{4}", False),
        ("\\boxed{4}", False),
        ("<think></think><think>i see 2.</think>", True),
    ],
)
def test_an_empty_block_is_no_thinking(completion: str, thinking: bool) -> None:
    assert thinks(completion) == thinking
