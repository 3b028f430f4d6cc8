"""From rollouts to scores: the parts of a reward, each from a function, a judge or a reward model, combined into one
Score."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from rewards import judge as judging
from rewards.mixture import combine
from rlhf.preference import sigmoid
from rlhf.recipe import Judging, Reward
from rlhf.roles import Engine, Rewards
from rlhf.types import Group, Sampling, Score


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


async def score(
    groups: Sequence[Group], parts: Mapping[str, Reward], rewards: Rewards, judges: Mapping[str, Judge]
) -> list[Group]:
    """The groups with one combined Score a rollout; `parts` are the recipe's reward table."""

    columns: dict[str, list[list[Score]]] = {}

    async def part(name: str, reward: Reward) -> None:
        if reward.judge is not None:
            right = columns[reward.only_if] if reward.only_if is not None else None
            columns[name] = await judges[reward.judge].score(groups, right)
        elif reward.scalar is not None:
            found = await rewards.scalar(reward.scalar, groups)
            columns[name] = [list(map(squashed, row)) for row in found] if reward.sigmoid else found
        else:
            assert reward.function is not None
            columns[name] = await rewards.score(reward.function, groups, reward.options)

    for waits in (False, True):  # first what depends on nothing
        wave = [part(name, reward) for name, reward in parts.items() if (reward.only_if is not None) == waits]
        await asyncio.gather(*wave)
    weights = {name: reward.weight for name, reward in parts.items()}
    return [
        dataclasses.replace(
            group,
            scores=tuple(
                combine({name: columns[name][g][r] for name in parts}, weights) for r in range(len(group.rollouts))
            ),
        )
        for g, group in enumerate(groups)
    ]


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
    for name in scored[0].parts:
        means[f"reward.{name}"] = sum(score.parts[name] for score in scored) / len(scored)
    return means
