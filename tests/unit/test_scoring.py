"""A judge's verdicts reach the rollouts they are about, and no chain is judged twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards.base import sources_of
from rlhf.curriculum import require_conditions
from rlhf.data.rows import read
from rlhf.data.tokenizer import train_tokenizer
from rlhf.provenance import functions_of
from rlhf.recipe import Chat, Judging, Rl
from rlhf.scoring import Judge, part_means, score
from rlhf.types import Group, Prompt, Rollout, Sampling, Score

SOUND = "<think>i see 3. so 3.</think>\\boxed{3}"
UNSOUND = "<think>i see 8. so 8.</think>\\boxed{8}"
TOKENIZER = train_tokenizer([SOUND, UNSOUND, "question: read the digits. reply: sound?"] * 5, 300, Chat())


class Engine:
    """Says that chains about an 8 are unsound, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        assert sampling.temperature == 0.0
        self.asked += len(prompts)
        texts = ["no" if "8" in prompt.question else "yes" for prompt in prompts]
        return [
            Group(prompt, prompt.token_ids, (Rollout((1,), (0.0,), (0,), text, "stop"),))
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def group(question: str, *texts: str) -> Group:
    rollouts = tuple(Rollout((1, 2), (0.0, 0.0), (0, 0), text, "stop") for text in texts)
    return Group(Prompt(question, "s", question, (1,), (), True, {}), (1,), rollouts)


def rewarded(**parts: dict[str, Any]) -> Rl:
    return Rl.model_validate(
        {"name": "s", "kind": "rl", "data": {"d": 1}, "steps": 1, "prompts_per_step": 1, "rewards": parts}
    )


class Functions:
    """Gives each rollout the value its text has under the function's name: {"a": 1, "b": [0.5, null]}."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}

    async def score(self, function: str, groups: Sequence[Group], options: object) -> list[list[Score]]:
        self.asked[function] = [group.prompt.key for group in groups]
        values = [[json.loads(r.text)[function] for r in group.rollouts] for group in groups]
        return [
            [Score("failed", note="it raised") if value is None else Score("scored", value) for value in row]
            for row in values
        ]


def given(key: str, *values: dict[str, float | None], **columns: Any) -> Group:
    return dataclasses.replace(
        group(key, *map(json.dumps, values)), prompt=Prompt(key, "stem", key, (1,), (), True, columns)
    )


def test_each_rollout_gets_its_own_verdict_and_equal_ones_are_asked_once() -> None:
    engine = Engine()
    groups = [
        group("read the digits.", SOUND, UNSOUND, SOUND, "\\boxed{3}"),
        group("count the digits.", SOUND, UNSOUND, UNSOUND),
    ]
    scores = asyncio.run(Judge(engine, TOKENIZER).score(groups))
    assert [[score.value for score in row] for row in scores] == [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert engine.asked == 4  # two chains under each of two questions; the one without a chain is not asked


def test_a_judge_is_asked_and_believed_as_the_recipe_says() -> None:
    class Hesitant(Engine):
        async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            assert sampling.max_tokens == 7
            return [Group(p, p.token_ids, (Rollout((1, 2), (-0.5, 0.0), (0, 0), "3 3. yes", "stop"),)) for p in prompts]

    def asked(confidence: float) -> list[float | None]:
        judge = Judge(Hesitant(), TOKENIZER, Judging(confidence=confidence, max_tokens=7))
        (scores,) = asyncio.run(judge.score([group("read the digits.", SOUND)]))
        return [score.value for score in scores]

    assert asked(0.6) == [1.0]
    assert asked(0.7) == [0.0]


def test_pictures_tell_equal_questions_apart() -> None:
    engine = Engine()
    asyncio.run(Judge(engine, TOKENIZER).score([group("read the digits.", SOUND), group("read the digits.", SOUND)]))
    assert engine.asked == 2


def test_where_the_answer_is_wrong_the_judge_is_not_asked() -> None:
    class Answers:
        async def score(self, function: str, groups: Sequence[Group], options: object) -> list[list[Score]]:
            return [[Score("scored", float("3}" in r.text)) for r in group.rollouts] for group in groups]

    engine = Engine()
    groups = [group("read the digits.", SOUND, UNSOUND, "<think>i see 8. so 3.</think>\\boxed{3}")]
    stage = rewarded(think={"judge": "j", "only_if": "answer"}, answer={"function": "a:b"})
    (scored,) = asyncio.run(score(groups, stage, Answers(), {"j": Judge(engine, TOKENIZER)}))
    assert [found.parts for found in scored.scores] == [
        {"think": 1.0, "answer": 1.0},
        {"think": 0.0, "answer": 0.0},
        {"think": 0.0, "answer": 1.0},
    ]
    assert engine.asked == 2


def test_a_product_counts_once_and_its_factors_through_it() -> None:
    """SAIL-RL's 0.9 · judge · think · answer + 0.1 · format."""
    stage = rewarded(
        judge={"function": "j"},
        think={"function": "t"},
        answer={"function": "a"},
        dual={"product": ["judge", "think", "answer"], "weight": 0.9},
        format={"function": "f", "weight": 0.1},
    )
    rows = [{"j": 1, "t": 2 / 3, "a": 1, "f": 1}, {"j": 0, "t": 1, "a": 1, "f": 1}, {"j": 0, "t": None, "a": 1, "f": 1}]
    (scored,) = asyncio.run(score([given("k", *rows)], stage, Functions(), {}))
    first, second, third = scored.scores
    assert first.value == pytest.approx(0.9 * 2 / 3 + 0.1)
    assert first.parts == {"judge": 1, "think": 2 / 3, "answer": 1, "dual": pytest.approx(2 / 3), "format": 1}
    assert second.value == pytest.approx(0.1)
    # a failure is no 0, even beside one
    assert (third.outcome, third.value, third.note) == ("failed", None, "think failed: it raised")
    # a factor with a weight of its own counts by itself too
    twice = rewarded(a={"function": "a", "weight": 1}, f={"function": "f"}, both={"product": ["a", "f"], "weight": 3})
    (scored,) = asyncio.run(score([given("k", {"a": 1, "f": 0.5})], twice, Functions(), {}))
    assert scored.scores[0].value == pytest.approx((1 + 3 * 0.5) / 4)


def test_parts_are_asked_and_count_only_where_their_when_is_true() -> None:
    stage = rewarded(
        number={"function": "n", "when": "source == 'stem' and level > 1"},
        words={"function": "w", "when": "level in (0, 1)", "clip": [0.0, 1.0]},
        form={"function": "f", "weight": 0.5},
        both={"product": ["number", "words"], "weight": 0.5},
    )
    functions = Functions()
    groups = [given("hard", {"n": 0.5, "f": 1}, level=2), given("easy", {"w": 7.0, "f": 0}, level=1)]
    scored = asyncio.run(score(groups, stage, functions, {}))
    assert functions.asked == {"n": ["hard"], "w": ["easy"], "f": ["hard", "easy"]}
    # number and words are factors, so that the product of those there are counts for them
    assert [g.scores[0].parts for g in scored] == [
        {"number": 0.5, "form": 1.0, "both": 0.5},
        {"words": 1.0, "form": 0.0, "both": 1.0},
    ]
    assert [g.scores[0].value for g in scored] == [0.75, 0.5]
    assert "clipped from 7" in scored[1].scores[0].note
    assert part_means(scored) == {
        "reward": 0.625,
        "reward.number": 0.5,
        "reward.words": 1.0,
        "reward.form": 0.5,
        "reward.both": 0.75,
    }


def test_a_prompt_that_no_part_is_for_fails_and_a_wrong_when_names_part_and_row() -> None:
    stage = rewarded(number={"function": "n", "when": "source == 'other'"})
    (scored,) = asyncio.run(score([given("k", {"n": 1})], stage, Functions(), {}))
    assert scored.scores[0].outcome == "failed"
    assert "no part of the reward is for k" in scored.scores[0].note
    stage = rewarded(number={"function": "n", "when": "levle > 1"})
    with pytest.raises(
        ValueError, match=r"rewards\.number: when = 'levle > 1' cannot be evaluated for k: .*levle.* level"
    ):
        asyncio.run(score([given("k", {"n": 1}, level=2)], stage, Functions(), {}))
    with pytest.raises(ValueError, match="is no expression"):
        rewarded(number={"function": "n", "when": "source = 'stem'"})
    for wrong in ({"product": ["a"]}, {"product": ["a", "b"], "function": "f"}, {"function": "f", "clip": [1, 0]}):
        with pytest.raises(ValueError, match=r"product|clip"):
            rewarded(a={"function": "f"}, b={"function": "f"}, c=wrong)


def test_a_condition_is_tried_on_all_rows_before_anything_is_learned(tmp_path: Path) -> None:
    stage = rewarded(number={"function": "n", "when": "level > 1"})
    path = tmp_path / "rows.jsonl"
    lines = [{"messages": [{"role": "user", "content": "?"}], "level": level} for level in (2, 1, None)]
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = read(path)
    with pytest.raises(ValueError, match=r"stage 's': rewards\.number: when = 'level > 1' .*rows\.jsonl, row 2"):
        require_conditions(stage, {"d": rows})
    require_conditions(rewarded(number={"function": "n", "when": "level is None or level > 1"}), {"d": rows})


def test_code_that_decides_a_score_is_what_its_file_imports_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import json\nfrom helper import f\n")
    (tmp_path / "helper.py").write_text("import deeper\n")
    (tmp_path / "deeper.py").write_text("import mine\n")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "built.so").write_bytes(b"\0")
    assert sources_of(tmp_path / "built.so") == [tmp_path / "built.so"]
    assert [path.name for path in sources_of(tmp_path / "mine.py")] == ["deeper.py", "helper.py", "mine.py"]
    stage = rewarded(
        thought={"function": "rewards.deciding:thought", "options": {"soundness": "mine.py:f", "words": "a: b"}}
    )
    assert functions_of(stage) == ["rewards.deciding:thought", "mine.py:f"]
