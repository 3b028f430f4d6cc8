"""What a policy maximises at each token, in a table, and the one loss that weighs and sums it.

An objective takes the tokens of a micro-batch and the recipe's Loss (clip range, normalisation). Denominators are
explicit and those of the whole step, so the losses of its micro-batches sum to the loss of the step, however it was
cut. Metrics are sums over this micro-batch's tokens, to be summed over micro-batches and ranks and divided by the sum
of "tokens"; a name ending in "_max" is reduced by max instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlhf.algorithms.correction import correct
from rlhf.algorithms.divergence import DIVERGENCES
from rlhf.types import Loss


@dataclass(frozen=True)
class Tokens:
    """The completion tokens of a micro-batch, as a loss sees them.

    logprobs      [B, T] under the policy being trained (with gradient)
    old_logprobs  [B, T] under the policy that the ratio compares with: the one that sampled them, or the trainer's
    advantages    [B, 1] one per row, or [B, T] one per token
    mask          [B, T] the row's weight at completion tokens, 0 elsewhere
    num_tokens, num_rows  completion tokens and rows of the whole optimizer step, over all ranks and micro-batches
    entropy       [B, T] of the policy, with gradient where loss.entropy asks for it
    sampled       [B, T] the engine's log-probabilities where old_logprobs are not; None where they are
    reference     [B, T] log-probabilities under the reference, where loss.kl asks for them
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    num_tokens: int = 1
    num_rows: int = 1
    entropy: Tensor | None = None
    sampled: Tensor | None = None
    reference: Tensor | None = None

    @cached_property
    def present(self) -> Tensor:
        """[B, T] True at completion tokens of rows that count."""
        return self.mask > 0

    @cached_property
    def lengths(self) -> Tensor:
        """[B, 1] completion tokens of each row, at least 1."""
        return self.present.sum(1, keepdim=True).clamp(min=1)

    @cached_property
    def log_ratio(self) -> Tensor:
        """[B, T] log of the new probability over the old, 0 outside the completions."""
        return torch.where(self.present, self.logprobs - self.old_logprobs, 0.0)


# what is maximised [B, T], and where a clip took the gradient away [B, T]
Objective = Callable[[Tokens, Loss], tuple[Tensor, Tensor]]


def likelihood(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """log π: supervised learning."""
    return tokens.logprobs, torch.zeros_like(tokens.present)


def reinforce(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """log π · A (Williams 1992): right on the policy, and uncorrected off it."""
    return tokens.logprobs * tokens.advantages, torch.zeros_like(tokens.present)


def ppo(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """min(ρ A, clip(ρ) A) with ρ = π / π_old (PPO, arXiv:1707.06347, eq. 7); for A < 0 no lower than dual_clip · A, so
    that one token whose ratio exploded does not outweigh the rest (dual clip, arXiv:1912.09729, eq. 5)."""
    return _clipped(tokens.log_ratio.exp(), tokens.advantages, loss)


def gspo(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """PPO's clip on one ratio a row, (π / π_old)^(1/|y|) (GSPO, arXiv:2507.18071, eqs. 5 and 7). Token ratios of a
    mixture of experts jump when routing flips; their geometric mean does not."""
    ratio = torch.exp(tokens.log_ratio.sum(1, keepdim=True) / tokens.lengths)
    objective, clipped = _clipped(ratio, tokens.advantages, loss)
    return objective.expand_as(tokens.mask), clipped.expand_as(tokens.mask)


def cispo(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """sg(clip(ρ)) · A · log π (CISPO, arXiv:2506.13585, eq. 4): the weight is clipped and the gradient never lost, so
    that rare tokens which open a reflection are learned from."""
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    return weight * tokens.advantages * tokens.logprobs, weight != ratio


OBJECTIVES: dict[str, Objective] = {
    "nll": likelihood,
    "reinforce": reinforce,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}


def policy_loss(tokens: Tokens, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """−Σ objective · weight, and metrics. Without `tokens.sampled` the ratio spans the mismatch between trainer and
    engine already, and the correction only masks.

    loss.normalise says what a token weighs:
        "token"     1 / num_tokens: every token of the step the same (DAPO)
        "row"       1 / num_rows: a row by its length (a sequence as one action: REINFORCE, SAIL-VL2's supervised loss)
        "row_mean"  1 / (num_rows · row length): every row the same (GRPO)
        "constant"  1 / (num_rows · loss.longest): by length, with a scale that no batch changes (Dr.GRPO)
    """
    objective, clipped = OBJECTIVES[loss.kind](tokens, loss)
    weights, corrected = tokens.mask, dict[str, Tensor]()
    if loss.kind != "nll":
        weigh = tokens.sampled is not None
        mismatch = tokens.old_logprobs - tokens.sampled if tokens.sampled is not None else tokens.log_ratio
        factors, corrected = correct(mismatch, tokens.present, loss.correction, weigh)
        weights = weights * factors
    denominator = _denominator(tokens, loss)
    value = -(objective * weights / denominator).sum()
    if loss.entropy:
        assert tokens.entropy is not None
        value = value - loss.entropy * (tokens.entropy * tokens.mask / denominator).sum()
    if loss.kl is not None:
        assert tokens.reference is not None
        estimator, weight = loss.kl
        distance = torch.where(tokens.present, DIVERGENCES[estimator](tokens.logprobs, tokens.reference), 0.0)
        value = value + weight * (distance * tokens.mask / denominator).sum()
        corrected["kl_reference"] = distance.detach().double().sum()
    return value, _metrics(tokens, loss, clipped) | corrected


def _denominator(tokens: Tokens, loss: Loss) -> Tensor | float:
    match loss.normalise:
        case "token":
            return tokens.num_tokens
        case "row":
            return tokens.num_rows
        case "row_mean":
            return tokens.lengths * tokens.num_rows
        case "constant":
            return tokens.num_rows * loss.longest


def _clipped(ratio: Tensor, advantages: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic objective, and where a clip took the gradient away."""
    bounded = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    above = (advantages > 0) & (ratio > 1 + loss.clip_high)
    below = (advantages < 0) & (ratio < 1 - loss.clip_low)
    clipped = above | below
    if loss.dual_clip is not None:
        floor = loss.dual_clip * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
        clipped = clipped | ((advantages < 0) & (ratio > loss.dual_clip))
    return objective, clipped


def _metrics(tokens: Tokens, loss: Loss, clipped: Tensor) -> dict[str, Tensor]:
    """Sums over completion tokens. kl_k1 and kl_k3 estimate KL(old ‖ new) (Schulman, "Approximating KL divergence")."""
    present = tokens.present
    if loss.kind == "nll":
        return {"tokens": present.sum(), "nll": -tokens.logprobs.detach()[present].double().sum()}
    log_ratio = tokens.log_ratio.detach()[present].double()
    ratio = log_ratio.exp()
    scored = tokens.advantages.expand_as(present)[present].double()
    row_ratio = torch.exp(tokens.log_ratio.detach().sum(1) / tokens.lengths[:, 0])[present.any(1)]
    return {
        "tokens": present.sum(),
        "clip_fraction": (clipped & present).sum(),
        "kl_k1": -log_ratio.sum(),
        "kl_k3": (ratio - 1 - log_ratio).sum(),
        "ratio_max": _largest(ratio),
        "sequence_ratio_max": _largest(row_ratio),
        "advantage": scored.sum(),
        "advantage_abs_max": _largest(scored.abs()),
    }


def _largest(values: Tensor) -> Tensor:
    return values.max() if len(values) else values.new_zeros(())
