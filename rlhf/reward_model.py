"""Learning what people prefer (Bradley–Terry, arXiv:1706.03741) by the trainer's own step.

A reward model gives a reply a number r. Of a pair the loss is −log σ(Δ − m) + c (r⁺ + r⁻)² − a r⁺, Δ = r⁺ − r⁻ being by
how much it prefers the chosen reply, m the pair's margin (Llama 2, arXiv:2307.09288, eq. 2), c what holds rewards
around 0 (arXiv:2312.09244), a what holds the chosen reply up where r is its likelihood (arXiv:2401.08417). Its slope in
either reward is a number that both rewards give; so a step first asks for the rewards, and then learns a weighted sum
of them: packed, over any number of ranks and micro-batches, a pair's replies need not even meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from rlhf.data.formatting import CHOSEN, REJECTED, Processor, as_pair
from rlhf.data.rows import DataError
from rlhf.preference import log_sigmoid, sigmoid
from rlhf.recipe import Chat, RewardModel
from rlhf.roles import Trainer
from rlhf.types import Batch, Sample

HEAD = "lm_head"  # under which name a model has its output, and a recipe's `train` the head


@dataclass(frozen=True)
class Pair:
    """What a reward model says of a pair's two replies, and by how much it should prefer the chosen one."""

    chosen: float
    rejected: float
    margin: float = 0.0

    @property
    def preferred(self) -> float:
        """By how much it does."""
        return self.chosen - self.rejected

    def loss(self, center: float, anchor: float = 0.0) -> float:
        ranked = -log_sigmoid(self.preferred - self.margin)
        return ranked + center * (self.chosen + self.rejected) ** 2 - anchor * self.chosen

    def slopes(self, center: float, anchor: float = 0.0) -> tuple[float, float]:
        """Of the loss in the rewards of the chosen and of the rejected reply."""
        missed, drift = sigmoid(self.margin - self.preferred), 2 * center * (self.chosen + self.rejected)
        return drift - missed - anchor, drift + missed


def with_head(train: Mapping[str, float]) -> dict[str, float]:
    """What trains of a reward model: its head, too, at the highest rate unless a glob gives it one."""
    named = any(fnmatchcase(f"{HEAD}.weight", glob) for glob in train)
    return dict(train) if named else {**train, f"{HEAD}.*": max(train.values())}


async def weigh(stage: RewardModel, trainer: Trainer, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """The batch of pairs with each sample's advantage, minus the slope of the loss in its reward, and the pairs'
    metrics: the loss, the share whose chosen reply is preferred, by how much, and the mean rewards of both kinds."""
    said = await trainer.rewards(batch)
    samples = [sample for rank in batch.micro_batches for part in rank for sample in part]
    # small data may bring a pair twice into a step; it then counts twice, as its gradient does
    chosen = [sample for sample in samples if sample.key.endswith(CHOSEN)]
    pairs = {sample.key.removesuffix(CHOSEN): _pair(sample, said) for sample in chosen}

    def weighed(sample: Sample) -> Sample:
        first = sample.key.endswith(CHOSEN)
        slopes = pairs[sample.key.removesuffix(CHOSEN if first else REJECTED)].slopes(stage.center, stage.anchor)
        return replace(sample, advantage=-2 * slopes[0 if first else 1])  # two rows a pair are what it is divided by

    found = [pairs[sample.key.removesuffix(CHOSEN)] for sample in chosen]
    cut = tuple(tuple(tuple(map(weighed, part)) for part in rank) for rank in batch.micro_batches)
    return replace(batch, micro_batches=cut), {
        "loss": math.fsum(pair.loss(stage.center, stage.anchor) for pair in found) / len(found),
        "accuracy": sum(pair.preferred > 0 for pair in found) / len(found),
        "margin": math.fsum(pair.preferred for pair in found) / len(found),
        "reward.chosen": math.fsum(pair.chosen for pair in found) / len(found),
        "reward.rejected": math.fsum(pair.rejected for pair in found) / len(found),
    }


def _pair(chosen: Sample, said: Mapping[str, float]) -> Pair:
    return Pair(said[chosen.key], said[chosen.key.removesuffix(CHOSEN) + REJECTED], chosen.margin)


def as_ranked(row: Mapping[str, Any], source: str, index: int, processor: Processor, chat: Chat) -> list[Sample]:
    """`as_pair`, with the row's `margin` where it has that column. Raises DataError also where it is no number."""
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise DataError(
            f"source {source!r}, row {index}: its margin is {margin!r}, not a number; give by how much the chosen "
            "reply is better, or leave the column out"
        )
    return [replace(sample, margin=float(margin or 0.0)) for sample in as_pair(row, source, index, processor, chat)]
