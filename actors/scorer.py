"""A trained reward model at work: a Ray actor's class that scores rollouts, pictures seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from actors.learner import prepare
from actors.scalar import one_output, restore_head, rewarded, scalar_of
from rlhf.batching import Cached, Visual, collate, make_batch
from rlhf.foreign import loop_over_experts, mixes_experts
from rlhf.types import Group, Loss, Sample, Score, TrainSpec


@dataclass(frozen=True)
class ScorerSettings:
    """How a reward model is held: packed and token_budget as for a trainer's micro-batches."""

    precision: Literal["float32", "bfloat16"]
    token_budget: int
    packed: bool
    threads: int
    device: str


class Scorer:
    """The reward model in an artifact's folder. Raises ValueError for a folder that holds none."""

    def __init__(self, folder: str, settings: ScorerSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._settings = settings
        looks = TrainSpec(
            folder, 0, Loss(), {}, steps=1, precision=settings.precision, packed=settings.packed
        )  # opened as a trainer opens it
        model, self._processor, visual = prepare(looks)
        self._scalar = scalar_of(Path(folder))
        if self._scalar.headed:
            restore_head(one_output(model, bias=False), Path(folder))
        if settings.device == "cpu" and mixes_experts(model):
            loop_over_experts(model)
        self._model: Any = model.to(settings.device).eval().requires_grad_(False)
        self._visual: Visual = Cached(visual)

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """One Score a rollout, for each group; a reply that was cut off is scored as far as it goes. The rollouts of a
        group go through the model together, and no others with them: what else is asked never changes a digit. A
        picture that cannot be read, or a reward that is not finite, fails its own rollouts."""
        return [self._group(group) for group in groups]

    @torch.no_grad()
    def _group(self, group: Group) -> list[Score]:
        try:
            samples = self._samples(group)
            batch = make_batch(samples, 1, self._settings.token_budget, packed=self._settings.packed)
            found: dict[str, float] = {}
            for part in batch.micro_batches[0]:
                each = rewarded(self._model, collate(part, self._visual).to(self._settings.device), self._scalar)
                found |= {sample.key: value for sample, value in zip(part, each.tolist(), strict=False)}
        except ValueError as error:  # of the row: its pictures, its length
            return [Score("failed", note=str(error))] * len(group.rollouts)
        return [_scored(found[sample.key]) for sample in samples]

    def _samples(self, group: Group) -> list[Sample]:
        """The rollouts with their question, its pictures expanded as this model sees them: the policy's bridge may have
        been rebuilt since."""
        prompt = group.prompt
        asked = tuple(self._processor.expand(list(prompt.token_ids), [item.size for item in prompt.media]))
        return [
            Sample(f"{prompt.key}.{place}", asked + rollout.token_ids, len(asked), prompt.media)
            for place, rollout in enumerate(group.rollouts)
        ]


def _scored(value: float) -> Score:
    return Score("scored", value) if math.isfinite(value) else Score("failed", note=f"its reward is {value}")
