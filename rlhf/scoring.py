"""From rollouts to scores: the parts of a reward, each from a function or a judge, combined into one Score."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from rewards import judge as judging
from rewards.mixture import clipped, combine, holds, product
from rlhf.recipe import Judging, Reward, Rl
from rlhf.roles import Engine, Rewards
from rlhf.types import Group, Sampling, Score

RIGHT = Score("scored", 1.0)


@dataclass(frozen=True)
class Judge:
    """A vision-language model that reads image, question and chain, and answers yes or no."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    settings: Judging = field(default_factory=Judging)

    async def score(self, groups: Sequence[Group], right: Sequence[Sequence[Score]] | None = None) -> list[list[Score]]:
        """One verdict a rollout: 1.0 sound, 0.0 unsound; a reply that does not parse is a failure. Given the scores of
        the answers, 0.0 without asking where one is not right."""
        wanted = [None] * len(groups) if right is None else [[found.value == 1.0 for found in row] for row in right]
        asked = [judging.ask(group, self.tokenizer, row) for group, row in zip(groups, wanted, strict=True)]
        # the same chain twice under one question is judged once: the judge is greedy
        distinct = {
            (g, prompt.token_ids): prompt for g, row in enumerate(asked) for prompt in row if prompt is not None
        }
        sampling = Sampling(temperature=0.0, max_tokens=self.settings.max_tokens)
        replies = await self.engine.generate(list(distinct.values()), sampling)
        sure = self.settings.confidence
        said = {key: judging.verdict(reply.rollouts[0], sure) for key, reply in zip(distinct, replies, strict=True)}
        return [
            [judging.not_asked() if prompt is None else said[g, prompt.token_ids] for prompt in row]
            for g, row in enumerate(asked)
        ]


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
        else:
            assert part.function is not None
            found = await rewards.score(part.function, chosen, part.options)
        columns[name] = {g: [clipped(s, part.clip) for s in row] for g, row in zip(places, found, strict=True)}

    asked = {name: part for name, part in stage.rewards.items() if part.product is None}
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
        weights = {name: stage.weights[name] for name in parts}
        if not any(weights.values()):
            return Score("failed", note=f"no part of the reward is for {groups[g].prompt.key}: see their `when`")
        return combine(parts, weights)

    return [
        dataclasses.replace(group, scores=tuple(combined(g, r) for r in range(len(group.rollouts))))
        for g, group in enumerate(groups)
    ]


def _applies(name: str, part: Reward, group: Group) -> bool:
    try:
        return part.when is None or holds(part.when, group.prompt)
    except ValueError as error:
        raise ValueError(f"rewards.{name}: {error}") from error


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
