"""A model that learns on this rank: its DeepSpeed engine, optimizer steps and checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.optimizer import embeddings, make_optimizer, rate
from rlhf.batching import BridgeVisual, Cached, Visual, collate
from rlhf.packing import attend_by_row
from rlhf.routing import calibrate
from rlhf.types import Batch, Sample, TrainSpec

_TAG = "state"


@dataclass(frozen=True)
class TrainInfo:
    """Facts of the model that a stage trains."""

    num_parameters: int
    num_trainable: int


class Learner(ABC):
    """Model, engine and counters of one stage. role and advice: for errors."""

    role: str
    advice: str

    def __init__(self, deepspeed: Any, spec: TrainSpec, rank: int, world_size: int, device: torch.device) -> None:
        from rlhf.foreign import loop_over_experts, mixes_experts

        self.spec, self.rank, self.world_size, self.device = spec, rank, world_size, device
        self._deepspeed = deepspeed
        torch.manual_seed(spec.seed)
        model, self.processor, visual = prepare(spec)
        self.visual: Visual = Cached(visual)
        self.moe = mixes_experts(model)
        if self.moe and device.type == "cpu":
            loop_over_experts(model)
        self.model: Any = self.shaped(model)
        self._optimizer, self._rates = make_optimizer(self.model, spec)
        self._hold_rows()
        if spec.zero_stage == 3:
            self._split()
        self.engine = deepspeed.initialize(model=self.model, optimizer=self._optimizer, config=_config(spec))[0]
        parameters = list(self.model.parameters())
        self.info = TrainInfo(
            num_parameters=sum(numel(p) for p in parameters),
            num_trainable=sum(numel(p) for p in parameters if p.requires_grad),
        )

    def _split(self) -> None:
        """Divide the parameters over ranks one by one: DeepSpeed by itself would first put the whole model on the
        device, which need not have room for it."""
        self._deepspeed.zero.Init(module=self.model, config_dict_or_path=_config(self.spec))
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)

    def _hold_rows(self) -> None:
        """With `spec.rows_of`: no gradient for the rows of other tokens."""
        if not self.spec.rows_of:
            return
        known = self.processor.tokenizer.get_vocab()
        if strange := [token for token in self.spec.rows_of if token not in known]:
            raise ValueError(f"rows_of: the tokenizer of {self.spec.model} does not know {strange[0]!r} as one token")
        ids = torch.tensor([known[token] for token in self.spec.rows_of], device=self.device)
        tables = [table for table in embeddings(self.model) if table.requires_grad]
        if not tables:
            raise ValueError(
                "rows_of says which rows of embeddings train, and no embedding does: name "
                "language_model.embed_tokens.* in `train`"
            )
        for table in tables:
            table.register_hook(lambda gradient: torch.zeros_like(gradient).index_copy(0, ids, gradient[ids]))

    @abstractmethod
    def shaped(self, model: nn.Module) -> nn.Module:
        """What trains, made of the model in the artifact."""

    def learn(self, batch: Batch, totals: Totals) -> dict[str, float]:
        """Move the weights by the gradients of `batch`, and what was counted of it. Raises FloatingPointError on every
        rank, before anything moves, if a loss or the gradient is not finite."""
        self._require_finite(totals, batch)
        norm, learning_rate = self._apply(batch)
        metrics = totals.reduce(self.world_size) | {"lr": learning_rate}
        if self.spec.muon is None or self.spec.zero_stage == 0:  # else the norm is that of Muon's steps
            metrics["grad_norm"] = norm
        return metrics

    def backward(self, loss: Tensor, samples: Sequence[Sample], totals: Totals, last: bool) -> None:
        """Gradients of one micro-batch's loss, reduced over ranks with those of the `last`."""
        value = float(loss.detach())
        if not math.isfinite(value):
            totals.bad.extend(sample.key for sample in samples)
        totals.sums["loss"] += value
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; the loss is already divided by the step's global denominator
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def _require_finite(self, totals: Totals, batch: Batch) -> None:
        """Raise on every rank if a loss was not finite on any of them, before the optimizer moves."""
        flag = torch.tensor([float(bool(totals.bad))], device=self.device)
        torch.distributed.all_reduce(flag)
        if not flag.item():
            return
        lists: list[list[str]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(lists, totals.bad)
        keys = [key for part in lists for key in part]
        self.engine.optimizer.zero_grad()
        raise FloatingPointError(
            f"the loss of optimizer step {batch.index} of {self.role} {self.spec.model} is not finite in the "
            f"micro-batches of {', '.join(keys[:8])}{' …' if len(keys) > 8 else ''}; look at these rows and "
            f"{self.advice}"
        )

    def _require_finite_gradient(self, norm: float, index: int) -> None:
        """A ratio that overflows on its clipped side has a finite loss and no finite gradient."""
        if not math.isfinite(norm):
            self.engine.optimizer.zero_grad()
            raise FloatingPointError(
                f"the gradient of optimizer step {index} of {self.role} {self.spec.model} has norm {norm}, though its "
                f"loss is finite: {self.advice} (a ratio of policy and rollouts too far apart has no finite gradient)"
            )

    def _apply(self, batch: Batch) -> tuple[float, float]:
        """Move the weights; the gradient's norm and the (largest) learning rate."""
        share = batch.scale * rate(batch.index, self.spec.steps, self.spec.warmup, self.spec.schedule)
        for group, full in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = full * share
        # without ZeRO the engine clips but keeps the norm to itself
        grads = [p.grad for p in self.model.parameters() if p.grad is not None] if self.spec.zero_stage == 0 else []
        norm = nn.utils.get_total_norm(grads) if grads else None
        if norm is None:  # under ZeRO the norm is known after the step; raising still comes before any save
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            self._require_finite_gradient(float(norm), batch.index)
        else:
            self._require_finite_gradient(float(norm), batch.index)
            self.engine.step()
        return float(norm), max(self.spec.train.values()) * share

    @contextmanager
    def evaluating(self) -> Iterator[tuple[nn.Module, Any, Visual]]:
        """The model without dropout. A bridge keeps its training flag at the place that decides whether text-only
        rows run a zero-weight vision pass: under ZeRO-3 every rank must run the same modules to gather them."""
        model = self.model if self.spec.lora is None else self.model.get_base_model()
        self.engine.eval()
        inner = model.model
        inner.training = True
        try:
            yield model, self.processor, self.visual
        finally:
            self.engine.train()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        torch.save(self.state(), folder / f"rank-{self.rank}.pt")
        torch.distributed.barrier()

    def restore(self, folder: Path) -> None:
        path = folder / f"rank-{self.rank}.pt"
        if not path.is_file():
            raise ValueError(f"{folder} holds no checkpoint of trainer rank {self.rank}: was it another world size?")
        own = torch.load(path, weights_only=True)
        if own["world_size"] != self.world_size:
            raise ValueError(
                f"{folder} was written by {own['world_size']} trainer ranks and cannot continue on {self.world_size}: "
                "set resources.trainer_ranks back"
            )
        found, _ = self.engine.load_checkpoint(str(folder), tag=_TAG)
        if found is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint")
        self.take(own)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights and optimizer."""
        return {"random": torch.get_rng_state(), "world_size": self.world_size}

    def take(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        torch.set_rng_state(state["random"])

    def free(self) -> None:
        self.engine.destroy()
        del self.engine, self.model, self._optimizer, self.visual, self.processor


class Totals:
    """Sums and maxima of a batch on this rank, then over ranks."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.maxima: defaultdict[str, float] = defaultdict(float)
        self.bad: list[str] = []

    def collect(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            if name.endswith("_max"):
                self.maxima[name] = max(self.maxima[name], float(value))
            else:
                self.sums[name] += float(value)

    def reduce(self, world_size: int) -> dict[str, float]:
        """Over all ranks: means over tokens, but for the loss, whose parts add up to it."""
        sums, maxima = dict(self.sums), dict(self.maxima)
        if world_size > 1:
            parts: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(parts, (sums, maxima))
            sums = {name: math.fsum(part[0].get(name, 0.0) for part in parts) for name in _keys(parts, 0)}
            maxima = {name: max(part[1].get(name, 0.0) for part in parts) for name in _keys(parts, 1)}
        tokens = sums.pop("tokens", 0.0)
        result = {name: value / max(1.0, tokens) for name, value in sums.items()}
        result |= {"loss": sums["loss"]} if "loss" in sums else {}
        return {**result, **maxima, "tokens": tokens}


def _keys(parts: Sequence[Any], index: int) -> list[str]:
    return sorted({name for part in parts for name in part[index]})


def prepare(spec: TrainSpec) -> tuple[Any, Any, Visual]:
    from rlhf import bridge
    from rlhf.foreign import open_model

    model, processor, visual = open_model(spec.model)
    if (spec.upcycle or spec.reset) and not isinstance(model, bridge.BridgeForConditionalGeneration):
        raise ValueError(f"{spec.model} is a {type(model).__name__}: `upcycle` and `reset` are for bridges only")
    if spec.upcycle is not None:
        model = bridge.upcycle(model, *spec.upcycle, spec.seed)
        if spec.calibration:
            calibrate(model, collate(spec.calibration, visual))
    if spec.reset:
        bridge.reset(model, spec.reset, spec.seed)
    if spec.packed:
        if not isinstance(model, bridge.BridgeForConditionalGeneration):
            raise ValueError(f"{spec.model} is a {type(model).__name__}: rows can be packed for bridges only")
        attend_by_row(model.model.language_model)
        visual = BridgeVisual(processor, packs=True)
    if spec.precision == "bfloat16":
        model = model.to(torch.bfloat16)
    if spec.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor, visual


def _config(spec: TrainSpec) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": spec.zero_stage, "overlap_comm": False}
    if spec.muon is not None:  # ZeRO-3 needs whole gradients for it
        zero["reduce_scatter"] = False
    if spec.offload and spec.zero_stage > 1:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Muon's steps have one size whatever the gradient's, and ZeRO would clip the steps
        "gradient_clipping": spec.clip_grad if spec.muon is None else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": spec.precision == "bfloat16"},
        # gradients of micro-batches and of ranks add up in full precision (DeepSpeed cannot without ZeRO)
        **({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"} if spec.zero_stage else {}),
        "steps_per_print": 1 << 30,
    }


def numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; ZeRO-3 leaves an empty tensor and the number in dsnumel."""
    return int(parameter.dsnumel) if hasattr(parameter, "dsnumel") else parameter.numel()
