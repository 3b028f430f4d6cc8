"""Log-probabilities as the rollout engine reports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.memory import LOGITS


def logprobs_of(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    masked_ids: Sequence[int] = (),
    entropy_gradient: bool = False,
    *,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """`processed_logprobs` of the logits that `head` makes of hidden states [N, width], without ever holding more than
    about LOGITS of the N · vocab_size: where there are more, `head` runs over few tokens at a time, and once again
    in backward."""

    def processed(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return processed_logprobs(head(part), wanted, temperature, masked_ids, entropy_gradient)

    at_once = max(1, LOGITS // vocab_size)
    if len(targets) <= at_once:
        return processed(hidden, targets)
    parts = zip(hidden.split(at_once), targets.split(at_once), strict=True)
    found = [checkpoint(processed, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


@torch.no_grad()
def likeliest(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, vocab_size: int) -> Tensor:
    """[N] True where no token is likelier than the target [N]; of hidden states [N, width], as many at once as
    `logprobs_of` takes."""
    parts = zip(*(each.split(max(1, LOGITS // vocab_size)) for each in (hidden, targets)), strict=True)
    return torch.cat([(logits := head(part)).amax(1) <= logits.gather(1, own[:, None])[:, 0] for part, own in parts])


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
