"""Learning from preferences (DPO, arXiv:2305.18290) by the trainer's own step.

The gradient of −log σ(β Δ), Δ = log π/π_ref of the chosen reply minus that of the rejected one, is that of a weighted
log-likelihood: chosen replies weigh β σ(−β Δ), rejected ones minus that. So a step first asks for the log-probabilities
of both replies, under the policy and its reference, and then learns as REINFORCE does, with these weights as
advantages: packed, over any number of ranks and micro-batches, a pair's replies need not even meet.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rlhf.data.formatting import CHOSEN, REJECTED
from rlhf.recipe import Preference
from rlhf.roles import Trainer
from rlhf.types import Batch, Sample


async def weigh(stage: Preference, trainer: Trainer, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """The batch of pairs with each sample's advantage, and the pairs' metrics: the loss in nats, the share of pairs
    whose chosen reply is preferred, the margin β Δ, and the implicit rewards β log π/π_ref of both kinds."""
    said = await trainer.logprobs(batch)
    rewards = {key: stage.beta * (math.fsum(own) - math.fsum(reference)) for key, (own, reference) in said.items()}
    keys = [sample.key for rank in batch.micro_batches for part in rank for sample in part]
    # small data may bring a pair twice into a step; it then counts twice, as its gradient does
    names = [key.removesuffix(CHOSEN) for key in keys if key.endswith(CHOSEN)]
    margins = {name: rewards[name + CHOSEN] - rewards[name + REJECTED] for name in names}

    def weighed(sample: Sample) -> Sample:
        chosen = sample.key.endswith(CHOSEN)
        margin = margins[sample.key.removesuffix(CHOSEN if chosen else REJECTED)]
        # two rows a pair are what the loss is divided by
        slope = 2 * stage.beta * ((1 - stage.smoothing) * sigmoid(-margin) - stage.smoothing * sigmoid(margin))
        return replace(sample, advantage=slope if chosen else -slope, logprobs=said[sample.key][0])

    found = [margins[name] for name in names]
    losses = [-(1 - stage.smoothing) * log_sigmoid(margin) - stage.smoothing * log_sigmoid(-margin) for margin in found]
    metrics = {
        "loss": math.fsum(losses) / len(losses),
        "accuracy": sum(margin > 0 for margin in found) / len(found),
        "margin": math.fsum(found) / len(found),
        "reward.chosen": math.fsum(rewards[name + CHOSEN] for name in names) / len(names),
        "reward.rejected": math.fsum(rewards[name + REJECTED] for name in names) / len(names),
    }
    cut = tuple(tuple(tuple(map(weighed, part)) for part in rank) for rank in batch.micro_batches)
    return replace(batch, micro_batches=cut), metrics


def sigmoid(value: float) -> float:
    """1 / (1 + e^-value)."""
    return math.exp(log_sigmoid(value))


def log_sigmoid(value: float) -> float:
    """log σ(value), for any value."""
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))
