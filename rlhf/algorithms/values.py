"""What a critic learns: to foretell, before each token, what the rollout will be worth."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, num_tokens: int, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ Σ max((v − R)², (v_old + clip(v − v_old, ±clip) − R)²) / num_tokens over completion tokens, each at its row's
    weight (PPO's clipped value loss, arXiv:2005.12729, §3), and sums over this micro-batch's tokens for the metrics of
    `rlhf.algorithms.losses`.

    values [B, T] (with gradient), old [B, T] the critic's before this step, returns [B, T], mask [B, T] weights.
    num_tokens: completion tokens of the whole step, over all ranks and micro-batches.
    """
    present = mask > 0
    error = (values - returns).square()
    clipped = torch.zeros_like(present)
    if clip is not None:
        held = (old + (values - old).clamp(-clip, clip) - returns).square()
        clipped = held > error
        error = torch.maximum(error, held)
    value = 0.5 * (error * mask).sum() / num_tokens
    known, missed = returns[present].double(), (returns - values.detach())[present].double()
    return value, {
        "tokens": present.sum(),
        "clip_fraction": (clipped & present).sum(),
        "value": values.detach()[present].double().sum(),
        "return": known.sum(),
        "return_squared": known.square().sum(),
        "missed": missed.sum(),
        "missed_squared": missed.square().sum(),
    }


def explained(metrics: dict[str, float]) -> dict[str, float]:
    """The means of `value_loss`'s metrics, with the share of the returns' variance that the values explain: 1 − Var(R −
    v) / Var(R), below 0 where a constant would do better; left out where the returns do not vary."""
    kept = dict(metrics)
    squares, misses = kept.pop("return_squared"), kept.pop("missed_squared")
    missed = kept.pop("missed")
    variance = squares - kept["return"] ** 2
    if variance > 1e-12:
        kept["explained_variance"] = 1 - (misses - missed**2) / variance
    return kept
