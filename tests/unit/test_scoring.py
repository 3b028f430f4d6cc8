"""A judge's verdicts reach the rollouts they are about, and no chain is judged twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rlhf.data.tokenizer import train_tokenizer
from rlhf.recipe import Chat, Judging, Reward
from rlhf.scoring import Judge, score
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
    parts = {"think": Reward(judge="j", only_if="answer"), "answer": Reward(function="a:b")}
    (scored,) = asyncio.run(score(groups, parts, Answers(), {"j": Judge(engine, TOKENIZER)}))
    assert [found.parts for found in scored.scores] == [
        {"think": 1.0, "answer": 1.0},
        {"think": 0.0, "answer": 0.0},
        {"think": 0.0, "answer": 1.0},
    ]
    assert engine.asked == 2
