"""Rows kept by rejection sampling, and pairs of a right reply and a wrong one."""

from __future__ import annotations

import pytest

from rlhf.recipe import Synthesize
from rlhf.synthesis import _accepted, _by_difficulty, _paired
from rlhf.types import Group, Prompt, Rollout, Score

STAGE = Synthesize.model_validate(
    {"kind": "synthesize", "name": "s", "method": "rejection", "data": {"q": 1.0}, "prompts": 1}
)


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]


def kept(*roles: str) -> list[dict[str, str]]:
    said = Rollout((5,), (0.0,), (0,), "new", "stop")
    group = Group(Prompt("k", "s", "?", (1,)), (1,), (said,))
    (row,) = _accepted(STAGE, {"messages": turns(*roles), "answer": "8"}, group, [Score("scored", 1.0)], None)
    assert row["messages"][-1] == {"role": "assistant", "content": "new"}
    return list(row["messages"][:-1])


def test_what_is_always_right_without_thinking_is_easy() -> None:
    stage = STAGE.model_copy(update={"method": "difficulty", "drop": {}, "think": False})
    right, wrong = Score("scored", 1.0), Score("scored", 0.0)

    def labelled(row: dict[str, str], *scores: Score) -> object:
        (made,) = _by_difficulty(stage, row, list(scores))
        return made["complexity"]

    assert labelled({}, right, right) == "easy"
    assert labelled({}, right, wrong) == "hard"
    assert labelled({"complexity": "hard"}, right, right) == "hard"  # somebody knew
    thinking = stage.model_copy(update={"think": True})
    assert "complexity" not in _by_difficulty(thinking, {}, [right])[0]
    with pytest.raises(ValueError, match="`think` = false tells how hard"):
        Synthesize.model_validate(STAGE.model_dump() | {"think": False})


def test_the_conversation_that_was_asked_is_kept_whole() -> None:
    assert kept("user") == turns("user")
    assert kept("user", "assistant") == turns("user")  # the row's own answer was not shown
    assert kept("system", "user", "assistant", "user") == turns("system", "user", "assistant", "user")


def test_each_right_reply_stands_beside_a_wrong_one_once() -> None:
    said = [("a", 1.0, "stop"), ("b", 0.0, "stop"), ("a", 1.0, "stop"), ("c", 0.0, "length"), ("d", 1.0, "stop")]
    said += [("e", 0.0, "stop"), ("f", 1.0, "stop")]
    rollouts = tuple(Rollout((5,), (0.0,), (0,), text, finish) for text, _, finish in said)
    scores = [Score("scored", value) for _, value, _ in said]
    group = Group(Prompt("k", "s", "?", (1,)), (1,), rollouts)

    def pairs(per_prompt: int) -> list[tuple[str, str]]:
        stage = STAGE.model_copy(update={"method": "pairs", "per_prompt": per_prompt})
        found = _paired(stage, {"messages": turns("user", "assistant"), "answer": "8"}, group, scores)
        assert all(row["messages"][:-1] == turns("user") for row in found)
        assert all((row["answer"], row["think"], row["corruption"]) == ("8", True, "own") for row in found)
        return [(row["messages"][-1]["content"], row["rejected"]) for row in found]

    assert pairs(4) == [("a", "b"), ("d", "e")]
    assert pairs(1) == [("a", "b")]
