"""What a critic learns: to foretell, before each token, what the rollout will be worth."""

from __future__ import annotations

from torch import Tensor


def value_loss(values: Tensor, returns: Tensor, mask: Tensor, num_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """½ Σ (v − R)² / num_tokens over completion tokens, each at its row's weight (PPO, arXiv:1707.06347, eq. 9), and
    sums over this micro-batch's tokens for the metrics of `rlhf.algorithms.losses`. Its clipped form would be the same:
    a batch is one optimizer step, whose values are those it starts from.

    values [B, T] (with gradient), returns [B, T], mask [B, T] weights.
    num_tokens: completion tokens of the whole step, over all ranks and micro-batches.
    """
    present = mask > 0
    value = 0.5 * ((values - returns).square() * mask).sum() / num_tokens
    known, said = returns[present].double(), values.detach()[present].double()
    return value, {
        "tokens": present.sum(),
        "value": said.sum(),
        "return": known.sum(),
        "return_squared": known.square().sum(),
        "missed_squared": (known - said).square().sum(),
    }


def explained(metrics: dict[str, float]) -> dict[str, float]:
    """The means of `value_loss`'s metrics, with the share of the returns' variance that the values explain: 1 − Var(R −
    v) / Var(R), below 0 where a constant would do better; left out where the returns do not vary."""
    kept = dict(metrics)
    squares, misses = kept.pop("return_squared"), kept.pop("missed_squared")
    variance = squares - kept["return"] ** 2
    if variance > 1e-12:
        kept["explained_variance"] = 1 - (misses - (kept["return"] - kept["value"]) ** 2) / variance
    return kept
