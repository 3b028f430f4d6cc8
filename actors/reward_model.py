"""The reward model as it trains: a policy's model that says one number of a reply instead of the next token."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from actors.learner import Totals
from actors.policy import Policy
from actors.scalar import one_output, restore_head, rewarded, write_head
from rlhf.batching import collate
from rlhf.reward_model import HEAD
from rlhf.routing import Usage, routers
from rlhf.types import Batch, Scalar


class RewardModel(Policy):
    """With a head, it says 0 of every reply at first; begun from the artifact of one with a head, what that says."""

    role = "the reward model"
    advice = "lower the learning rate"

    def shaped(self, model: nn.Module) -> nn.Module:
        self._words = None
        return super().shaped(self._headed(model) if self._scalar.headed else model)

    def _headed(self, model: nn.Module) -> nn.Module:
        words = model.get_output_embeddings().weight  # type: ignore[operator]
        tied = words is model.get_input_embeddings().weight  # type: ignore[operator]
        # the artifact opens as the model it was, so what was not tied to the embeddings has to be there
        self._words = None if tied else words.detach().to("cpu", copy=True)
        head = one_output(model, bias=False)
        if getattr(model, HEAD, None) is not head:
            raise ValueError(f"{self.spec.model} is a {type(model).__name__}, whose output is not named {HEAD}")
        restore_head(head, Path(self.spec.model))
        return model

    @property
    def _scalar(self) -> Scalar:
        assert self.spec.scalar is not None
        return self.spec.scalar

    def accumulate(
        self,
        batch: Batch,
        totals: Totals,
        fresh: bool,  # noqa: ARG002 - nothing of a batch was sampled
    ) -> tuple[list[Tensor], Usage | None]:
        """Gradients of one batch on this rank: those of −Σ advantage · reward over the rows of the step."""
        rows, usage = batch.micro_batches[self.rank], None
        self.engine.train()
        for index, samples in enumerate(rows):
            tensors = collate(samples, self.visual).to(self.device)
            with routers(self.model) as routed:
                rewards = rewarded(self.model, tensors, self._scalar, self.engine)
            # of a dummy row 0 times its reward: every rank must run backward through the whole model
            loss = -(tensors.advantages[:, 0] * tensors.weights * rewards).sum() / max(1, batch.num_rows)
            loss, usage = self.balanced(loss, routed, tensors, batch, usage)
            totals.collect({"tokens": (tensors.mask > 0).sum()})
            self.backward(loss, samples, totals, last=index == len(rows) - 1)
        return [], usage

    def rewards(self, batch: Batch) -> dict[str, float]:
        """Of this rank's samples, by key: the reward of the whole reply; no gradient."""
        found: dict[str, float] = {}
        with self.evaluating(), torch.no_grad():
            for samples in batch.micro_batches[self.rank]:
                tensors = collate(samples, self.visual).to(self.device)
                each = rewarded(self.model, tensors, self._scalar, self.engine).tolist()
                found |= {sample.key: value for sample, value in zip(samples, each, strict=False)}  # a blank may follow
        return found

    def export(self, folder: Path) -> None:
        """Write the model, with the language head it began with, its processor, and beside them the head of its own and
        how it is asked."""
        saved = self.model if self.spec.lora is None else self.model.get_base_model()
        tensors = {name: value.to("cpu", copy=True) for part in self.parts(1 << 30) for name, value in part}
        if self.rank == 0:
            head = tensors.pop(f"{HEAD}.weight") if self._scalar.headed else None
            if self._words is not None:
                tensors[f"{HEAD}.weight"] = self._words
            saved.save_pretrained(folder, state_dict=tensors, safe_serialization=True)
            self.processor.save_pretrained(folder)
            write_head(folder, head, self._scalar)
        torch.distributed.barrier()
