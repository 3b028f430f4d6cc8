"""The log-probabilities of a reply's tokens, taken where the model's head is, so that no forward holds all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algorithms.logprobs import likeliest, logprobs_of
from rlhf.batching import Tensors
from rlhf.types import Loss


def likelihoods(
    model: Any, tensors: Tensors, loss: Loss, through: Any = None, greedy: bool = False, **more: Any
) -> tuple[Tensor, Tensor, Any]:
    """Log-probabilities and entropies [B, L − 1] in nats, 0 outside completions, and the output of the model; `greedy`:
    in the place of entropies whether greedy decoding takes the token. `through`: the engine by which it is called;
    `more`: for its forward. Raises ValueError for a model that does more to logits than its head."""
    kept, predicting = tensors.predictions()  # prompts take no logits
    targets = tensors.input_ids[:, 1:][tensors.completion]
    with _scoring(model, predicting, targets, loss, greedy) as scored:
        out = (through or model)(**tensors.model_inputs(), use_cache=False, logits_to_keep=kept, **more)
    (given,) = scored
    if out.logits.shape != given.shape or not torch.allclose(out.logits, given, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"a {type(model).__name__} changes its logits after its head: nobody can take the log-probabilities of its "
            "tokens there"
        )
    found, spread = out.logits.unbind()
    shape = tensors.completion.shape
    logprobs = found.new_zeros(shape).masked_scatter(tensors.completion, found)
    entropy = spread.new_zeros(shape).masked_scatter(tensors.completion, spread)
    return logprobs, entropy, out


@contextmanager
def _scoring(model: Any, predicting: Tensor, targets: Tensor, loss: Loss, greedy: bool) -> Iterator[list[Tensor]]:
    """Meanwhile the model's "logits" are log-probabilities and entropies (`greedy`: 1 for the likeliest token, else 0)
    [2, N] of `targets` [N], each predicted at the place `predicting` [N] of the head's input, so that a forward never
    holds all the logits; what the head gave is put into the list."""
    head, scored = model.get_output_embeddings(), list[Tensor]()
    plain, vocabulary = head.forward, model.config.get_text_config().vocab_size

    def forward(hidden: Tensor) -> Tensor:
        # looked up: rows that share a prompt add their gradients of its last token in one order
        found = nn.functional.embedding(predicting, hidden.flatten(0, -2))
        settings = (loss.temperature, loss.masked_ids, loss.entropy > 0)
        logprobs, spread = logprobs_of(plain, found, targets, *settings, vocab_size=vocabulary)
        if greedy:
            spread = likeliest(plain, found, targets, vocab_size=vocabulary).to(logprobs)
        scored.append(torch.stack((logprobs, spread)))
        return scored[0]

    head.forward = forward  # inside of the hooks that gather the head's weight under ZeRO-3
    try:
        yield scored
    finally:
        del head.forward
