"""Engine and trainer never compute quite the same probabilities; what to do where they differ.

The weights below multiply a token's share of the loss, without gradient. For the trainer's own probabilities p of the
policy that sampled, and the engine's q, the ratio p / q is what is left of mismatch (kernels, routing flips) once the
importance ratio π / p is taken care of; where the ratio is π / q already, nothing is left to weigh, only to mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.types import Correction


def correct(log_ratio: Tensor, present: Tensor, how: Correction, weigh: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights [B, T] of tokens whose log p / q is log_ratio [B, T], 0 where they are masked, and sums for metrics.

    truncate  weigh by min(p / q, truncate): truncated importance sampling (Yao et al. 2025, "Your efficient RL
              framework secretly brings you off-policy RL training"); only with `weigh`
    mask      drop tokens with p / q outside [low, high]: IcePop (Ling team, arXiv:2510.18855)
    rows      drop rows whose geometric mean of p / q is outside [low, high] (Li et al. 2025, "When speed kills
              stability")
    """
    log_ratio = torch.where(present, log_ratio.detach(), 0.0)
    ratio = log_ratio.exp()
    weights = present.to(log_ratio.dtype)
    metrics: dict[str, Tensor] = {}
    if how.truncate is not None and weigh:
        metrics["mismatch_truncated"] = ((ratio > how.truncate) & present).sum()
        weights = weights * ratio.clamp(max=how.truncate)
    if how.mask is not None:
        kept = (ratio >= how.mask[0]) & (ratio <= how.mask[1])
        metrics["mismatch_masked"] = (~kept & present).sum()
        weights = weights * kept
    if how.rows is not None:
        mean = torch.exp(log_ratio.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1))
        inside = (mean >= how.rows[0]) & (mean <= how.rows[1])
        metrics["mismatch_masked_rows"] = (~inside & present).sum()
        weights = weights * inside
    return weights, metrics
