"""The critic: a copy of the policy's model with one output, that learns what rollouts are worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actors.learner import Learner, Totals
from actors.scalar import one_output
from rlhf.algorithms.values import explained, value_loss
from rlhf.batching import Tensors, collate
from rlhf.types import Batch, Loss, TrainSpec


class Critic(Learner):
    """Begun from the policy's artifact, whole and by AdamW, whatever trains of the policy. Says 0 at first."""

    role = "the critic of"
    advice = "lower critic.lr"

    def __init__(self, deepspeed: Any, spec: TrainSpec, rank: int, world_size: int, device: torch.device) -> None:
        assert spec.critic is not None
        plain: dict[str, Any] = {"lora": None, "whole": (), "rows_of": (), "muon": None, "reference": False}
        own = replace(spec, loss=Loss(), train={"*": spec.critic}, **plain)
        super().__init__(deepspeed, own, rank, world_size, device)

    def shaped(self, model: nn.Module) -> nn.Module:
        one_output(model, bias=True)
        return model

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step towards the samples' returns; its metrics, named critic.*."""
        totals, rows = Totals(), batch.micro_batches[self.rank]
        self.engine.train()
        for index, samples in enumerate(rows):
            tensors = collate(samples, self.visual).to(self.device)
            values, out = self._values(tensors)
            loss, metrics = value_loss(values, tensors.returns, tensors.mask, max(1, batch.num_tokens))
            # every rank must run backward through the whole model, also for a dummy row without a completion
            loss = loss + 0.0 * out.sum() if not bool(tensors.completion.any()) else loss
            totals.collect(metrics)
            self.backward(loss, samples, totals, last=index == len(rows) - 1)
        found = explained(self.learn(batch, totals))
        # the policy's tokens, and its schedule
        return {f"critic.{name}": value for name, value in found.items() if name not in ("tokens", "lr")}

    def values(self, batch: Batch) -> dict[str, tuple[float, ...]]:
        """Of this rank's samples, by key: what the critic says before each completion token."""
        found: dict[str, tuple[float, ...]] = {}
        with self.evaluating(), torch.no_grad():
            for samples in batch.micro_batches[self.rank]:
                tensors = collate(samples, self.visual).to(self.device)
                said, _ = self._values(tensors)
                for row, sample in enumerate(samples):
                    found[sample.key] = tuple(said[row][tensors.completion[row]].tolist())
        return found

    def _values(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """[B, L − 1] before token t + 1, 0 outside completions, and the model's output at every kept position."""
        kept, predicting = tensors.predictions()
        out = self.engine(**tensors.model_inputs(), use_cache=False, logits_to_keep=kept).logits
        # looked up, as the policy's logits are
        found = nn.functional.embedding(predicting, out.flatten(0, 1))[:, 0].float()
        return found.new_zeros(tensors.completion.shape).masked_scatter(tensors.completion, found), out
