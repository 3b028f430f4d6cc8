"""Losses as functions in a table, with explicit masks and explicit global denominators.

Every function takes

    logprobs      [B, T] of the completion tokens under the policy being trained (with gradient)
    old_logprobs  [B, T] under the policy that sampled them
    advantages    [B]    one per row
    mask          [B, T] the row's weight at completion tokens, 0 elsewhere
    loss          the recipe's Loss: clip range, normalisation
    num_tokens, num_rows  completion tokens and rows of the whole optimizer step, over all ranks and micro-batches

and returns (loss, metrics). Because the denominators are those of the whole step, the losses of its micro-batches
sum to the loss of the step, however it was cut. Metrics are sums over this micro-batch's tokens, to be summed over
micro-batches and ranks and divided by the sum of "tokens"; a name ending in "_max" is reduced by max instead.
"""

# ruff: noqa: ARG001 - one signature for the whole table

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rlhf.types import Loss


class PolicyLoss(Protocol):
    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        loss: Loss,
        num_tokens: int,
        num_rows: int,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def nll(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: Loss,
    num_tokens: int,
    num_rows: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the completions: the mean over all tokens of the step ("token"), or summed over each
    row's tokens and averaged over rows ("row": SAIL-VL2, arXiv:2509.14033, §5.2)."""
    total = -(logprobs * mask).sum()
    present = mask > 0
    metrics = {
        "tokens": present.sum(),
        "nll": -logprobs.detach()[present].double().sum(),
    }
    return total / (num_tokens if loss.normalise == "token" else num_rows), metrics


def grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: Loss,
    num_tokens: int,
    num_rows: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO (arXiv:2402.03300, eq. 3) without its KL term: PPO's clip per token, the mean over each row's tokens, then
    the mean over rows."""
    objective, clipped = _clipped(torch.exp(logprobs - old_logprobs), advantages[:, None], loss)
    lengths = (mask > 0).sum(1, keepdim=True).clamp(min=1)
    value = -(objective * mask / lengths).sum() / num_rows
    return value, _metrics(logprobs, old_logprobs, advantages, mask, clipped)


def dapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: Loss,
    num_tokens: int,
    num_rows: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DAPO (arXiv:2503.14476, eq. 8): GRPO with a higher upper clip and the mean over all tokens of the step, so that a
    long row weighs by its tokens."""
    objective, clipped = _clipped(torch.exp(logprobs - old_logprobs), advantages[:, None], loss)
    return -(objective * mask).sum() / num_tokens, _metrics(logprobs, old_logprobs, advantages, mask, clipped)


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss: Loss,
    num_tokens: int,
    num_rows: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (arXiv:2507.18071, eqs. 5 and 7): one ratio a row, (π/π_old)^(1/|y|), clipped per row; the mean over rows.
    Token ratios of a mixture of experts jump when routing flips; their geometric mean does not."""
    present = mask > 0
    lengths = present.sum(1).clamp(min=1)
    difference = torch.where(present, logprobs - old_logprobs, 0.0)
    ratio = torch.exp(difference.sum(1) / lengths)
    objective, clipped = _clipped(ratio, advantages, loss)
    # the mask holds the row's weight at each of its tokens; its mean over them is the row's weight
    value = -(objective * mask.sum(1) / lengths).sum() / num_rows
    metrics = _metrics(logprobs, old_logprobs, advantages, mask, clipped[:, None].expand_as(present))
    kept = torch.where(present.any(1), ratio.detach(), 0.0)
    return value, {**metrics, "sequence_ratio_max": kept.max()}


LOSSES: dict[str, PolicyLoss] = {"nll": nll, "grpo": grpo, "dapo": dapo, "gspo": gspo}

_CLIP = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


def defaults(algorithm: str) -> tuple[float, float]:
    """The paper's clip range (low, high) of a policy loss. Raises ValueError for an unknown algorithm."""
    if algorithm not in _CLIP:
        raise ValueError(f'unknown algorithm {algorithm!r}: choose one of {", ".join(_CLIP)}, or "auto"')
    return _CLIP[algorithm]


def _clipped(ratio: Tensor, advantages: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic objective, and where the clip took the gradient away."""
    bounded = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    above = (advantages > 0) & (ratio > 1 + loss.clip_high)
    below = (advantages < 0) & (ratio < 1 - loss.clip_low)
    return objective, above | below


def _metrics(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clipped: Tensor
) -> dict[str, Tensor]:
    """Sums over completion tokens. kl_k1 and kl_k3 estimate KL(old ‖ new) (Schulman, "Approximating KL divergence")."""
    present = mask > 0
    log_ratio = (logprobs.detach() - old_logprobs)[present].double()
    ratio = log_ratio.exp()
    rows = present.any(1)
    scored = advantages[rows].double()
    return {
        "tokens": present.sum(),
        "clip_fraction": (clipped & present).sum(),
        "kl_k1": -log_ratio.sum(),
        "kl_k3": (ratio - 1 - log_ratio).sum(),
        "ratio_max": ratio.max() if len(ratio) else ratio.new_zeros(()),
        "advantage": (advantages[:, None].double() * present).sum(),
        "advantage_abs_max": scored.abs().max() if len(scored) else scored.new_zeros(()),
    }
