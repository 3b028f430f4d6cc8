"""The token mask inside vLLM's sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TokenMask(LogitsProcessor):
    """Sets the logits of `additional_config["masked_tokens"]` to -inf, for every request.

    Exactly the trainer's mask, which `logit_bias` (bounded at -100) is not, and one operation for a whole batch, where
    `allowed_token_ids` would carry the vocabulary with every request.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
        config = vllm_config.additional_config
        assert isinstance(config, dict)
        self._ids = torch.tensor(config["masked_tokens"], dtype=torch.long, device=device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:  # noqa: ARG002
        return None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill_(-1, self._ids, float("-inf"))
