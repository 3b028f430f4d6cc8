"""Log-probabilities as the rollout engine reports them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor


def processed_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    masked_ids: Sequence[int] = (),
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of targets [N] under logits [N, V], and entropies [N] (with gradient if asked), in nats.

    As the engine samples: logits in float32, divided by the temperature, −inf at masked ids, then log-softmax.
    A target that is masked gets −inf.
    """
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    if masked_ids:
        masked = torch.tensor(masked_ids, device=scaled.device)
        scaled = scaled.index_fill(1, masked, -torch.inf)
    normaliser = torch.logsumexp(scaled, dim=1)
    logprobs = scaled.gather(1, targets[:, None])[:, 0] - normaliser
    with nullcontext() if entropy_gradient else torch.no_grad():
        probabilities = torch.exp(scaled - normaliser[:, None])
        # 0 · −inf is no part of the expectation
        expected = (
            (probabilities * scaled.masked_fill(scaled == -torch.inf, 0.0)).sum(1)
            if masked_ids
            else (probabilities * scaled).sum(1)
        )
        entropy = normaliser - expected
    return logprobs, entropy
