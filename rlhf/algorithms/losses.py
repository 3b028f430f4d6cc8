"""Losses as functions in a table, with explicit masks and explicit global denominators.

Every function takes the tokens of a micro-batch and the recipe's Loss (clip range, normalisation), and returns (loss,
metrics). Because the denominators are those of the whole step, the losses of its micro-batches sum to the loss of the
step, however it was cut. Metrics are sums over this micro-batch's tokens, to be summed over micro-batches and ranks and
divided by the sum of "tokens"; a name ending in "_max" is reduced by max instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlhf.types import Loss


@dataclass(frozen=True)
class Tokens:
    """The completion tokens of a micro-batch, as a loss sees them.

    logprobs      [B, T] under the policy being trained (with gradient)
    old_logprobs  [B, T] under the policy that sampled them
    advantages    [B]    one per row
    mask          [B, T] the row's weight at completion tokens, 0 elsewhere
    num_tokens, num_rows  completion tokens and rows of the whole optimizer step, over all ranks and micro-batches
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    num_tokens: int = 1
    num_rows: int = 1

    @cached_property
    def present(self) -> Tensor:
        """[B, T] True at completion tokens of rows that count."""
        return self.mask > 0

    @cached_property
    def lengths(self) -> Tensor:
        """[B] completion tokens of each row, at least 1."""
        return self.present.sum(1).clamp(min=1)

    @cached_property
    def log_ratio(self) -> Tensor:
        """[B, T] log of the new probability over the old, 0 outside the completions."""
        return torch.where(self.present, self.logprobs - self.old_logprobs, 0.0)


PolicyLoss = Callable[[Tokens, Loss], tuple[Tensor, dict[str, Tensor]]]


def nll(tokens: Tokens, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the completions: the mean over all tokens of the step ("token"), or summed over each
    row's tokens and averaged over rows ("row": SAIL-VL2, arXiv:2509.14033, §5.2)."""
    total = -(tokens.logprobs * tokens.mask).sum()
    nats = -tokens.logprobs.detach()[tokens.present].double().sum()
    denominator = tokens.num_tokens if loss.normalise == "token" else tokens.num_rows
    return total / denominator, {"tokens": tokens.present.sum(), "nll": nats}


def grpo(tokens: Tokens, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO (arXiv:2402.03300, eq. 3) without its KL term: PPO's clip per token, the mean over each row's tokens, then
    the mean over rows."""
    objective, clipped = _clipped(tokens.log_ratio.exp(), tokens.advantages[:, None], loss)
    value = -(objective * tokens.mask / tokens.lengths[:, None]).sum() / tokens.num_rows
    return value, _metrics(tokens, clipped)


def dapo(tokens: Tokens, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """DAPO (arXiv:2503.14476, eq. 8): GRPO with a higher upper clip and the mean over all tokens of the step, so that a
    long row weighs by its tokens."""
    objective, clipped = _clipped(tokens.log_ratio.exp(), tokens.advantages[:, None], loss)
    return -(objective * tokens.mask).sum() / tokens.num_tokens, _metrics(tokens, clipped)


def gspo(tokens: Tokens, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO (arXiv:2507.18071, eqs. 5 and 7): one ratio a row, (π/π_old)^(1/|y|), clipped per row; the mean over rows.
    Token ratios of a mixture of experts jump when routing flips; their geometric mean does not."""
    ratio = torch.exp(tokens.log_ratio.sum(1) / tokens.lengths)
    objective, clipped = _clipped(ratio, tokens.advantages, loss)
    # the mask holds the row's weight at each of its tokens; its mean over them is the row's weight
    value = -(objective * tokens.mask.sum(1) / tokens.lengths).sum() / tokens.num_rows
    metrics = _metrics(tokens, clipped[:, None].expand_as(tokens.mask))
    kept = torch.where(tokens.present.any(1), ratio.detach(), 0.0)
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


def _metrics(tokens: Tokens, clipped: Tensor) -> dict[str, Tensor]:
    """Sums over completion tokens. kl_k1 and kl_k3 estimate KL(old ‖ new) (Schulman, "Approximating KL divergence")."""
    present = tokens.present
    log_ratio = tokens.log_ratio.detach()[present].double()
    ratio = log_ratio.exp()
    rows = present.any(1)
    scored = tokens.advantages[rows].double()
    return {
        "tokens": present.sum(),
        "clip_fraction": (clipped & present).sum(),
        "kl_k1": -log_ratio.sum(),
        "kl_k3": (ratio - 1 - log_ratio).sum(),
        "ratio_max": ratio.max() if len(ratio) else ratio.new_zeros(()),
        "advantage": (tokens.advantages[:, None].double() * present).sum(),
        "advantage_abs_max": scored.abs().max() if len(scored) else scored.new_zeros(()),
    }
