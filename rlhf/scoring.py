"""From rollouts to scores: the parts of a reward, each from a function, a judge or a reward model, combined into one
Score."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rewards import judge as judging
from rewards.cache import Cache, key_of
from rewards.endpoint import Endpoint
from rewards.judge import SOUND, Question
from rewards.mixture import clipped, combine, holds, product
from rlhf.preference import sigmoid
from rlhf.recipe import Judging, Reward, Rl
from rlhf.roles import Engine, Rewards
from rlhf.tasks import ended
from rlhf.types import Group, Prompt, Rollout, Sampling, Score

RIGHT = Score("scored", 1.0)


@dataclass(frozen=True)
class Judge:
    """A model that reads question and reply, and pictures, and says what its `question` asks: served by an engine, or
    behind an endpoint, whose `tokenizer` is the policy's where there is one, for the marks that replies must not spell.

    What a `cache` holds is not asked again; `key` is of everything that decides what the model says to a prompt."""

    engine: Engine | Endpoint
    tokenizer: PreTrainedTokenizerBase | None
    settings: Judging = field(default_factory=Judging)
    question: Question = SOUND
    cache: Cache | None = None
    key: tuple[Any, ...] = ()

    async def score(self, groups: Sequence[Group], right: Sequence[Sequence[Score]] | None = None) -> list[list[Score]]:
        """One verdict a rollout; a reply that does not parse is a failure. Given the scores of the answers, 0.0 without
        asking where one is not right."""
        wanted = [None] * len(groups) if right is None else [[found.value == 1.0 for found in row] for row in right]
        asked = [self._ask(group, row) for group, row in zip(groups, wanted, strict=True)]
        # the same chain twice under one question is judged once: the judge is greedy
        distinct = {(g, prompt.question): prompt for g, row in enumerate(asked) for prompt in row if prompt is not None}
        keys = {place: self._key_of(prompt) for place, prompt in distinct.items()} if self.cache is not None else {}
        known = self.cache.get(keys.values()) if self.cache is not None else {}
        said = {place: known[key] for place, key in keys.items() if key in known}
        left = {place: prompt for place, prompt in distinct.items() if place not in said}
        # a call that somebody is paid for is kept as it comes, whatever becomes of the others
        parts = [[place] for place in left] if isinstance(self.engine, Endpoint) else [list(left)]

        async def ask(part: list[tuple[int, str]]) -> None:
            found = dict(zip(part, await self._said([left[place] for place in part]), strict=True))
            said.update(found)
            if self.cache is not None:
                self.cache.put({keys[place]: score for place, score in found.items()})

        tasks = [asyncio.create_task(ask(part)) for part in parts if part]
        try:
            await asyncio.gather(*tasks)
        finally:
            await ended(tasks)
        return [
            [
                said[g, prompt.question] if prompt is not None else self._unasked(None if row is None else row[r])
                for r, prompt in enumerate(prompts)
            ]
            for g, (prompts, row) in enumerate(zip(asked, wanted, strict=True))
        ]

    async def replies(self, prompts: Sequence[Prompt], regex: str | None = None) -> list[Rollout | Score]:
        """What the model says to each question, in words and without ids, and its pictures, greedily; from an endpoint
        also the Score of what failed. `rewards.bias.compared` asks so."""
        if isinstance(self.engine, Endpoint):
            return await self.engine.ask(prompts)
        assert self.tokenizer is not None  # the judge's own
        rendered = [judging.rendered(prompt, place, self.tokenizer) for place, prompt in enumerate(prompts)]
        sampling = Sampling(temperature=0.0, max_tokens=self.settings.max_tokens, regex=regex)
        return [group.rollouts[0] for group in await self.engine.generate(rendered, sampling)]

    def _ask(self, group: Group, wanted: Sequence[bool] | None) -> list[Prompt | None]:
        marks = self.tokenizer.get_added_vocab() if self.tokenizer is not None else ()
        foreign = isinstance(self.engine, Endpoint)
        return judging.texts(group, self.question, marks, wanted, foreign)

    async def _said(self, prompts: Sequence[Prompt]) -> list[Score]:
        confidence, grammar = self.settings.confidence, self.question.grammar
        replies = await self.replies(prompts, grammar.regex if self.question.enforced else None)
        return [reply if isinstance(reply, Score) else judging.verdict(reply, confidence, grammar) for reply in replies]

    def _key_of(self, prompt: Prompt) -> str:
        return key_of(*self.key, prompt.question, [media.digest(reads=False) for media in prompt.media])

    def _unasked(self, wanted: bool | None) -> Score:
        return self.question.not_right() if wanted is False else self.question.not_asked()


async def score(groups: Sequence[Group], stage: Rl, rewards: Rewards, judges: Mapping[str, Judge]) -> list[Group]:
    """The groups with one combined Score a rollout, by the stage's reward table. A part with a `when` is asked, and
    counts, only where that is true of the prompt; a group to which no part applies has failed. Raises ValueError that
    names part and row for a `when` that cannot be evaluated."""

    columns: dict[str, dict[int, list[Score]]] = {}  # part → place of the group → its scores

    async def ask(name: str, part: Reward) -> None:
        places = [g for g, group in enumerate(groups) if _applies(name, part, group)]
        chosen = [groups[g] for g in places]
        if part.judge is not None:
            first = columns[part.only_if] if part.only_if is not None else {}
            right = [first.get(g, [RIGHT] * len(groups[g].rollouts)) for g in places]
            found = await judges[part.judge].score(chosen, right)
        elif part.scalar is not None:
            found = await rewards.scalar(part.scalar, chosen)
            found = [list(map(squashed, row)) for row in found] if part.sigmoid else found
        else:
            assert part.function is not None
            found = await rewards.score(part.function, chosen, part.options)
        columns[name] = {g: [clipped(s, part.clip) for s in row] for g, row in zip(places, found, strict=True)}

    asked, shares = {name: part for name, part in stage.rewards.items() if part.product is None}, stage.weights
    for waits in (False, True):  # first what depends on nothing
        wave = [ask(name, part) for name, part in asked.items() if (part.only_if is not None) == waits]
        await asyncio.gather(*wave)

    def combined(g: int, r: int) -> Score:
        found = {name: columns[name][g][r] for name in asked if g in columns[name]}
        parts = dict[str, Score]()
        for name, part in stage.rewards.items():
            if part.product is None:
                parts |= {name: found[name]} if name in found else {}
            elif factors := {factor: found[factor] for factor in part.product if factor in found}:
                parts[name] = clipped(product(factors), part.clip)
        weights = {name: shares[name] for name in parts}
        if not any(weights.values()):
            return Score("failed", note=f"no part of the reward is for {groups[g].prompt.key}: see their `when`")
        return combine(parts, weights)

    return [
        dataclasses.replace(group, scores=tuple(combined(g, r) for r in range(len(group.rollouts))))
        for g, group in enumerate(groups)
    ]


def _applies(name: str, part: Reward, group: Group) -> bool:
    prompt = group.prompt
    try:
        return part.when is None or holds(part.when, prompt.source, prompt.columns, prompt.key)
    except ValueError as error:
        raise ValueError(f"rewards.{name}: {error}") from error


def squashed(score: Score) -> Score:
    """The score with σ of its value, where it has one."""
    return score if score.value is None else dataclasses.replace(score, value=sigmoid(score.value))


async def verified(function: str, groups: Sequence[Group], rewards: Rewards) -> list[list[Score]]:
    """One score a rollout from a function that may not fail: neither what is measured nor which data is kept may hang
    on an accident. Raises RuntimeError that names function, prompt and cause."""
    scores = await rewards.score(function, groups)
    for group, row in zip(groups, scores, strict=True):
        for found in row:
            if found.value is None:
                raise RuntimeError(f"{function} failed on {group.prompt.key}: {found.note}")
    return scores


def failure_rate(groups: Sequence[Group]) -> float:
    """Share of rollouts whose reward failed or timed out."""
    scores = [score for group in groups for score in group.scores]
    return sum(score.outcome != "scored" for score in scores) / max(len(scores), 1)


def part_means(groups: Sequence[Group]) -> dict[str, float]:
    """Mean of every reward part over the scored rollouts: {"reward": …, "reward.answer": …}."""
    scored = [score for group in groups for score in group.scores if score.outcome == "scored"]
    if not scored:
        return {}
    means = {"reward": sum(score.value or 0.0 for score in scored) / len(scored)}
    for name in dict.fromkeys(name for score in scored for name in score.parts):
        values = [score.parts[name] for score in scored if name in score.parts]  # a part need not be for every prompt
        means[f"reward.{name}"] = sum(values) / len(values)
    return means
