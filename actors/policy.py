"""The policy: what supervised stages and reinforcement learning train, publish and export."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.learner import Learner, Totals, numel, prepare
from actors.likelihood import likelihoods
from actors.optimizer import base_name
from actors.signals import Target, signalling
from rlhf.agreement import NEAR_TIE
from rlhf.algorithms.divergence import DIVERGENCES
from rlhf.algorithms.losses import OBJECTIVES, Tokens, policy_loss
from rlhf.batching import Tensors, collate
from rlhf.routing import Routing, Usage, lowest_margins, routers
from rlhf.types import Batch, Fit, Loss, StepStats, TrainSpec


class Policy(Learner):
    """A model whose tokens' probabilities change, as one of `rlhf.algorithms` wants it."""

    role = "the policy"
    advice = "lower the learning rate or updates_per_step"

    def __init__(self, deepspeed: Any, spec: TrainSpec, rank: int, world_size: int, device: torch.device) -> None:
        if spec.loss.kind not in OBJECTIVES:
            raise ValueError(f"unknown loss {spec.loss.kind!r}: choose one of {', '.join(OBJECTIVES)}")
        super().__init__(deepspeed, spec, rank, world_size, device)
        # where adapters alone train, the base is the reference; else every rank holds a copy of its own, whole
        needed = spec.reference and not self.adapts
        self.target = Target(self.model.config.head, self.processor.tokenizer, device) if spec.signals else None
        self.reference = prepare(spec)[0].to(device).eval().requires_grad_(False) if needed else None
        # of the step before: this step's are known after its last micro-batch; none, as if uniform, pull nowhere
        self._shares: Tensor | None = None

    @property
    def adapts(self) -> bool:
        """Adapters train, and nothing else."""
        return self.spec.lora is not None and not self.spec.whole

    def shaped(self, model: nn.Module) -> nn.Module:
        return model if self.spec.lora is None else adapt(model, self.spec)

    def free(self) -> None:
        self.reference = None
        super().free()

    def step(self, batch: Batch, fresh: bool) -> StepStats:
        totals = Totals()
        differences, usage = self.accumulate(batch, totals, fresh)
        gap, tied = self._gather(differences) if fresh else ([], [])
        metrics = self.learn(batch, totals)
        if usage is not None:
            summed = usage.over_ranks()
            self._shares = summed.shares(self.spec.loss.router_count)
            metrics |= summed.metrics()
        return StepStats(metrics, gap, tied)

    def accumulate(self, batch: Batch, totals: Totals, fresh: bool) -> tuple[list[Tensor], Usage | None]:
        """Gradients of one batch on this rank, reduced over ranks by DeepSpeed; of its sampled tokens, a micro-batch
        each, [2, N]: |trainer − engine| log-probability difference in nats, and 1 where a router was at a tie;
        none unless `fresh`; and what this rank's tokens make of a mixture's experts."""
        loss_spec = self.spec.loss
        rows = batch.micro_batches[self.rank]
        differences, usage = list[Tensor](), None
        self.engine.train()
        for index, samples in enumerate(rows):
            tensors = collate(samples, self.visual).to(self.device)
            with routers(self.model) as routed:
                places, captions = (None, []) if self.target is None else self.target.places(samples, tensors)
                logprobs, entropy, out = self._forward(tensors, loss_spec, places=places)
            own = loss_spec.compare == "trainer"
            counted = Tokens(
                logprobs,
                # one update a batch: the policy before it is the policy now
                logprobs.detach() if own else tensors.old_logprobs,
                tensors.advantages,
                tensors.mask,
                max(1, batch.num_tokens),
                max(1, batch.num_rows),
                entropy=entropy,
                sampled=tensors.old_logprobs if own else None,
                reference=self._reference_logprobs(tensors) if loss_spec.kl is not None else None,
            )
            loss, metrics = policy_loss(counted, loss_spec)
            loss, usage = self.balanced(loss, routed, tensors, batch, usage)
            # every rank must run backward through the whole model, also for a dummy row without a completion
            loss = loss + 0.0 * out.logits.sum() if not bool(tensors.completion.any()) else loss
            if self.target is not None:
                missed = self.target.missed(out.signals, captions) / max(1, signalling(batch))
                loss = loss + self.spec.signals * missed
                totals.sums["signals"] += float(missed.detach()) * batch.num_tokens  # metrics are over tokens
            totals.sums["entropy"] += float((entropy.detach().double() * (tensors.mask > 0)).sum())
            totals.collect(metrics)
            if fresh:
                sampled = tensors.completion & tensors.sampled[:, None]
                gap = (logprobs.detach() - tensors.old_logprobs).abs()
                margins = lowest_margins((routing.margin() for routing in routed.values()), tensors)[:, :-1]
                tied = torch.from_numpy(margins < NEAR_TIE).to(gap)
                differences.append(torch.stack((gap[sampled], tied[sampled])))
            self.backward(loss, samples, totals, last=index == len(rows) - 1)
        return differences, usage

    def balanced(
        self, loss: Tensor, routed: dict[str, Routing], tensors: Tensors, batch: Batch, usage: Usage | None
    ) -> tuple[Tensor, Usage | None]:
        """A micro-batch's loss with what uneven use of experts costs, and the use of the batch so far with its own;
        both as they were for a dense model, of which nothing is `routed`."""
        if not routed:
            return loss, usage
        spec, used = self.spec.loss, Usage.of(routed, tensors, self.processor.image_token_id)
        if spec.router_aux and self._shares is not None:
            times = len(routed) if spec.router_layers == "sum" else 1
            loss = loss + spec.router_aux * times * used.imbalance(self._shares, batch.num_read)
        return loss, used.detach() if usage is None else usage + used.detach()

    def divergences(self, batch: Batch, estimator: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for samples in batch.micro_batches[self.rank]:
            tensors = collate(samples, self.visual).to(self.device)
            each = DIVERGENCES[estimator](tensors.old_logprobs, self._reference_logprobs(tensors))
            sums = torch.where(tensors.completion, each, 0.0).double().sum(1)
            found |= {sample.key: float(value) for sample, value in zip(samples, sums[: len(samples)], strict=True)}
        return found

    def logprobs(self, batch: Batch) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        found: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
        for samples in batch.micro_batches[self.rank]:
            tensors = collate(samples, self.visual).to(self.device)
            with self.evaluating(), torch.no_grad():
                own, _, _ = self._forward(tensors, self.spec.loss)
            reference = self._reference_logprobs(tensors)
            for row, sample in enumerate(samples):
                where = tensors.completion[row]
                found[sample.key] = tuple(own[row][where].tolist()), tuple(reference[row][where].tolist())
        return found

    def _reference_logprobs(self, tensors: Tensors) -> Tensor:
        """[B, L − 1] under the model the stage began with, 0 outside completions."""
        if self.reference is not None:
            with torch.no_grad():
                return self._forward(tensors, self.spec.loss, self.reference)[0]
        if not self.adapts:
            raise RuntimeError("this stage keeps no reference: its spec has reference = False")
        with self.evaluating(), self.model.disable_adapter(), torch.no_grad():
            return self._forward(tensors, self.spec.loss)[0]

    def _forward(
        self, tensors: Tensors, loss: Loss, model: Any = None, places: Tensor | None = None, greedy: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """`likelihoods` of `model` (the policy, through its engine)."""
        more = {} if places is None else {"signal_places": places}
        if model is not None:
            return likelihoods(model, tensors, loss, greedy=greedy, **more)
        return likelihoods(self.model, tensors, loss, self.engine, greedy, **more)

    def _gather(self, differences: list[Tensor]) -> tuple[list[float], list[bool]]:
        """[N] each, ranks in order: |trainer − engine| in nats, and whether a router was at a tie."""
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, torch.cat(differences, dim=1).cpu().numpy())
        gap, tied = np.concatenate(parts, axis=1)
        return gap.tolist(), (tied > 0).tolist()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "shares": self._shares}

    def take(self, state: Mapping[str, Any]) -> None:
        super().take(state)
        self._shares = state.get("shares")  # none in one that is older than they are

    def losses(self, batch: Batch) -> dict[str, Fit]:
        found: dict[str, Fit] = {}
        with self.evaluating(), torch.no_grad():
            for samples in batch.micro_batches[self.rank]:
                tensors = collate(samples, self.visual).to(self.device)
                logprobs, leads = self._forward(tensors, Loss(), greedy=True)[:2]
                rows = zip(samples, tensors.completion, logprobs, leads, strict=False)  # a blank one may follow
                for sample, learned, row, best in rows:
                    if sample.weight > 0:
                        nll = -float(row[learned].double().sum())
                        found[sample.key] = Fit(nll, int(learned.sum()), bool(best[learned].all()))
        return found

    def parts(self, bucket_bytes: int, everywhere: bool = False) -> Iterator[list[tuple[str, Tensor]]]:
        """(name, value) of every parameter under the base model's names, in parts of about bucket_bytes, empty on ranks
        other than 0 unless `everywhere`. Mostly the parameters themselves: a part is good until the next is asked for.
        Collective under ZeRO-3."""
        for names in _chunks(self._sources(), bucket_bytes):
            parameters = [p for _, needed in names for p in needed]
            with self._gathered(parameters):
                yield [(name, self._whole(name)) for name, _ in names] if self.rank == 0 or everywhere else []

    def _sources(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """Base name of every parameter, and the parameters needed to compute it."""
        for name, parameter in self.model.named_parameters():
            if self.spec.lora is not None and ".lora_" in name:
                continue
            needed = [parameter]
            if ".base_layer." in name:
                layer = self.model.get_submodule(name.partition(".base_layer.")[0])
                needed += [p for key, p in layer.named_parameters() if key.startswith("lora_")]
            yield base_name(name), needed

    def _whole(self, name: str) -> Tensor:
        if self.spec.lora is None:
            value = self.model.get_parameter(name)
        else:
            module, _, leaf = name.rpartition(".")
            layer = self.model.get_base_model().get_submodule(module)
            if hasattr(layer, "base_layer"):
                value = layer.base_layer.get_parameter(leaf)
                if leaf == "weight":
                    value = value.detach() + layer.get_delta_weight("default")
            else:
                value = layer.get_parameter(leaf)
        return value.detach()

    @contextmanager
    def _gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        if self.spec.zero_stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield

    def export(self, folder: Path) -> None:
        if self.adapts:
            saved, tensors = self.model, self._adapter()
        else:
            saved, parts = self.model if self.spec.lora is None else self.model.get_base_model(), self.parts(1 << 30)
            tensors = {name: value.to("cpu", copy=True) for part in parts for name, value in part}
        if self.rank == 0:
            saved.save_pretrained(folder, state_dict=tensors, safe_serialization=True)
            self.processor.save_pretrained(folder)
        torch.distributed.barrier()

    def _adapter(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                with self._gathered([parameter]):
                    tensors[name] = parameter.detach().cpu().clone()
        return tensors


def _chunks(
    sources: Iterator[tuple[str, list[nn.Parameter]]], limit: int
) -> Iterator[list[tuple[str, list[nn.Parameter]]]]:
    """Runs of parameters of about `limit` bytes, each at least one parameter."""
    chunk: list[tuple[str, list[nn.Parameter]]] = []
    size = 0
    for name, needed in sources:
        weight = sum(4 * numel(p) for p in needed)
        if chunk and size + weight > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, needed))
        size += weight
    if chunk:
        yield chunk


def adapt(model: nn.Module, spec: TrainSpec) -> Any:
    """The model with low-rank adapters on the decoder's layers of `spec.lora`'s names, and nowhere else: an encoder's
    layers are often called the same. The decoder is the module `language_model`, or what transformers takes for it.
    Raises ValueError where no layer has such a name."""
    from peft import LoraConfig, get_peft_model

    assert spec.lora is not None
    rank, alpha, targets = spec.lora
    modules = dict(model.named_modules())
    names = list(modules)
    decoder = next((name for name in names if name.rpartition(".")[2] == "language_model"), None)
    if decoder is None:
        inner = model.get_decoder()  # type: ignore[operator]
        decoder = next(name for name, module in modules.items() if module is inner)
    pattern = rf"{re.escape(f'{decoder}.' if decoder else '')}(.*\.)?({'|'.join(map(re.escape, targets))})"
    if not any(re.fullmatch(pattern, name) for name in names):
        raise ValueError(f"lora.target_modules = {list(targets)}: no layer of the decoder is called so")
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern))
    # the adapter names its base; a folder by its whole path, so that it opens from anywhere
    base = Path(spec.model)
    adapted.peft_config["default"].base_model_name_or_path = str(base.resolve()) if base.exists() else spec.model
    return adapted
