"""KL(π ‖ reference) estimated at tokens sampled from π (Schulman 2020, "Approximating KL divergence")."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log π − log reference [B, T]: unbiased, of high variance, and its gradient's expectation is zero in a loss; meant
    for the reward."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """½ (log π − log reference)² [B, T]: biased, of low variance; as a loss its gradient is that of the true KL."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """reference/π − 1 − log reference/π [B, T]: unbiased, of low variance and never negative; GRPO's
    (arXiv:2402.03300, eq. 4)."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1 - log_ratio


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
