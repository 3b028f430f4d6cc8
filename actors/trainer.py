"""One DeepSpeed rank: the optimizer steps, the weights to publish, the checkpoints. With `actors.optimizer` the home of
deepspeed.

Every method of TrainerRank is collective: the driver calls it on all ranks at once with equal arguments. A loss that is
not finite is raised on all of them; any other error on its own rank, while the others may wait for it in a collective.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.optimizer import base_name, make_optimizer, rate
from rlhf.agreement import NEAR_TIE, Routed, lowest_margins, routers
from rlhf.algorithms.divergence import DIVERGENCES
from rlhf.algorithms.logprobs import processed_logprobs
from rlhf.algorithms.losses import OBJECTIVES, Tokens, policy_loss
from rlhf.batching import BridgeVisual, Cached, Tensors, Visual, collate
from rlhf.packing import attend_by_row
from rlhf.types import Batch, Loss, Probe, ProbeScores, StepStats, TrainSpec

Bucket = list[tuple[str, np.ndarray]]

_TAG = "state"


@dataclass(frozen=True)
class TrainInfo:
    """Facts of the model that a stage trains."""

    num_parameters: int
    num_trainable: int


class TrainerRank:
    """Rank `rank` of `world_size`. Constructing it joins the process group at `address` ("host:port"), which every
    collective of it leaves with an error after `timeout` seconds. One per process; `begin` may be called again."""

    def __init__(
        self, rank: int, world_size: int, address: str, threads: int, device: str = "cpu", timeout: float = 300.0
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._deepspeed = _start(rank, world_size, address, threads, device, timeout)
        self._threads = threads
        self._stage: _Stage | None = None

    def begin(self, spec: TrainSpec) -> TrainInfo:
        """Load spec.model and make it ready to train. Raises ValueError for globs that match nothing, and for an
        upcycling or reset the model does not support."""
        self.end()
        self._stage = _Stage(self._deepspeed, spec, self.rank, self.world_size, self.device)
        return self._stage.info

    def step(self, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        """One optimizer step; `fresh`: the weights are those that sampled the batch's current rows, whose
        log-probabilities are compared with the engine's; not `alone`: on spec.beside threads. Raises FloatingPointError
        naming step and samples if a loss is not finite; the model is then as before."""
        stage = self._begun
        torch.set_num_threads(self._threads if alone else stage.spec.beside or self._threads)
        try:
            return stage.step(batch, fresh)
        finally:
            torch.set_num_threads(self._threads)

    def losses(self, batch: Batch) -> dict[str, float]:
        """{"loss": mean negative log-likelihood of the completion tokens in nats, "tokens": their number};
        temperature 1, nothing masked, no gradient."""
        return self._begun.losses(batch)

    def divergences(self, batch: Batch, estimator: str) -> dict[str, float]:
        """Of this rank's samples, by key: the divergence from the reference at their sampled tokens under the policy
        that sampled them, summed, in nats. Needs a spec with `reference`."""
        return self._begun.divergences(batch, estimator)

    def probe(self, probes: Sequence[Probe]) -> ProbeScores:
        """The trainer's log-probabilities on fixed sequences."""
        from rlhf.agreement import probe_model

        with self._begun.evaluating() as (model, processor, visual):
            return probe_model(model, processor, visual, probes)

    def fingerprints(self, probes: Sequence[Probe]) -> Any:
        """Outputs of every module on fixed sequences, to find where an engine differs."""
        from rlhf.agreement import fingerprint_model

        with self._begun.evaluating() as (model, processor, visual):
            return fingerprint_model(model, processor, visual, probes)

    def weights(self, bucket_bytes: int) -> list[Bucket]:
        """All parameters, whole, LoRA merged, under the model's own names, as copies in buckets of about bucket_bytes
        each; bfloat16 as its bits in uint16. On rank 0; other ranks take part and get []."""
        buckets = [[(name, _as_array(value)) for name, value in part] for part in self._begun.parts(bucket_bytes)]
        return buckets if self.rank == 0 else []

    def save(self, folder: str | Path) -> None:
        """Write weights, optimizer and random state into an existing or new folder. Atomic naming is the caller's."""
        self._begun.save(Path(folder))

    def restore(self, folder: str | Path) -> None:
        """Continue bit-exactly from what `save` wrote, after `begin` with the same spec on as many ranks.

        DeepSpeed's files are pickles: verify that they are your own before calling. Raises ValueError if the folder
        holds no checkpoint of this world size."""
        self._begun.restore(Path(folder))

    def export(self, folder: str | Path) -> None:
        """Write the model and its processor as a Hugging Face folder; with LoRA the adapter alone, in peft's format,
        naming its base."""
        self._begun.export(Path(folder))

    def end(self) -> None:
        """Free model and optimizer; the process group stays for the next `begin`."""
        if self._stage is not None:
            self._stage.free()
            self._stage = None
            gc.collect()

    def close(self) -> None:
        """End the stage and leave the process group."""
        self.end()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def _begun(self) -> _Stage:
        if self._stage is None:
            raise RuntimeError("no stage has begun on this trainer: call begin(spec) first")
        return self._stage


class _Stage:
    """Model, engine and counters of one stage."""

    def __init__(self, deepspeed: Any, spec: TrainSpec, rank: int, world_size: int, device: torch.device) -> None:
        from rlhf.foreign import mixes_experts

        if spec.loss.kind not in OBJECTIVES:
            raise ValueError(f"unknown loss {spec.loss.kind!r}: choose one of {', '.join(OBJECTIVES)}")
        self.spec, self.rank, self.world_size, self.device = spec, rank, world_size, device
        self._deepspeed = deepspeed
        torch.manual_seed(spec.seed)
        model, self.processor, visual = _prepare(spec)
        self.visual: Visual = Cached(visual)
        self.moe = mixes_experts(model)
        if self.moe and device.type == "cpu":
            _loop_over_experts(model)
        self.model: Any = model if spec.lora is None else _adapt(model, spec)
        # with LoRA the base is the reference; without, every rank holds a copy of its own, whole
        self.reference = _prepare(spec)[0].to(device).eval().requires_grad_(False) if _needs_copy(spec) else None
        self._optimizer, self._rates = make_optimizer(self.model, spec)
        self.engine = deepspeed.initialize(model=self.model, optimizer=self._optimizer, config=_config(spec))[0]
        parameters = list(self.model.parameters())
        self.info = TrainInfo(
            num_parameters=sum(_numel(p) for p in parameters),
            num_trainable=sum(_numel(p) for p in parameters if p.requires_grad),
        )

    def step(self, batch: Batch, fresh: bool) -> StepStats:
        totals = _Totals()
        differences = self.accumulate(batch, totals, fresh)
        self._require_finite(totals, batch)
        gap, tied = self._gather(differences) if fresh else ([], [])
        norm, learning_rate = self._apply(batch.index)
        metrics = totals.reduce(self.world_size) | {"lr": learning_rate}
        if self.spec.muon is None or self.spec.zero_stage == 0:  # else the norm is that of Muon's steps
            metrics["grad_norm"] = norm
        return StepStats(metrics, gap, tied)

    def accumulate(self, batch: Batch, totals: _Totals, fresh: bool) -> list[Tensor]:
        """Gradients of one batch on this rank, reduced over ranks by DeepSpeed; of its sampled tokens, a micro-batch
        each, [2, N]: |trainer − engine| log-probability difference in nats, and 1 where a router was at a tie;
        none unless `fresh`."""
        loss_spec = self.spec.loss
        rows = batch.micro_batches[self.rank]
        length = sum(len(s.token_ids) for mine in batch.micro_batches for part in mine for s in part)
        differences: list[Tensor] = []
        self.engine.train()
        for index, samples in enumerate(rows):
            self.engine.set_gradient_accumulation_boundary(index == len(rows) - 1)
            tensors = collate(samples, self.visual).to(self.device)
            unheard: AbstractContextManager[Routed] = nullcontext({})
            with routers(self.model) if fresh else unheard as routed:
                logprobs, entropy, out = self._forward(tensors, loss_spec)
            own = loss_spec.compare == "trainer"
            counted = Tokens(
                logprobs,
                # one update a batch: the policy before it is the policy now
                logprobs.detach() if own else tensors.old_logprobs,
                tensors.advantages[:, None],
                tensors.mask,
                max(1, batch.num_tokens),
                max(1, batch.num_rows),
                entropy=entropy,
                sampled=tensors.old_logprobs if own else None,
                reference=self._reference_logprobs(tensors) if loss_spec.kl is not None else None,
            )
            loss, metrics = policy_loss(counted, loss_spec)
            if loss_spec.router_aux and self.moe and samples:
                # a mean over the micro-batch's tokens, a prompt that rows share being there once; by its share of the
                # rows' tokens the step's micro-batches add up to a mean
                share = int(tensors.attention_mask.sum()) / length
                totals.sums["router_aux"] += float(out.aux_loss.detach()) * share
                loss = loss + loss_spec.router_aux * share * out.aux_loss
            # every rank must run backward through the whole model, also for a dummy row without a completion
            loss = loss + 0.0 * out.logits.sum() if not bool(tensors.completion.any()) else loss
            value = float(loss.detach())
            if not math.isfinite(value):
                totals.bad.extend(sample.key for sample in samples)
            totals.sums["loss"] += value
            totals.sums["entropy"] += float((entropy.detach().double() * (tensors.mask > 0)).sum())
            totals.collect(metrics)
            if fresh:
                sampled = tensors.completion & tensors.sampled[:, None]
                gap = (logprobs.detach() - tensors.old_logprobs).abs()
                margins = lowest_margins(routed, tensors)[:, :-1]
                tied = torch.from_numpy(margins < NEAR_TIE).to(gap)
                differences.append(torch.stack((gap[sampled], tied[sampled])))
            # DeepSpeed averages over ranks; the loss is already divided by the step's global denominator
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        return differences

    def divergences(self, batch: Batch, estimator: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for samples in batch.micro_batches[self.rank]:
            tensors = collate(samples, self.visual).to(self.device)
            each = DIVERGENCES[estimator](tensors.old_logprobs, self._reference_logprobs(tensors))
            sums = torch.where(tensors.completion, each, 0.0).double().sum(1)
            found |= {sample.key: float(value) for sample, value in zip(samples, sums[: len(samples)], strict=True)}
        return found

    def _reference_logprobs(self, tensors: Tensors) -> Tensor:
        """[B, L − 1] under the model the stage began with, 0 outside completions."""
        if self.reference is not None:
            with torch.no_grad():
                return self._forward(tensors, self.spec.loss, self.reference)[0]
        if self.spec.lora is None:
            raise RuntimeError("this stage keeps no reference: its spec has reference = False")
        with self.evaluating(), self.model.disable_adapter(), torch.no_grad():
            return self._forward(tensors, self.spec.loss)[0]

    def _forward(self, tensors: Tensors, loss: Loss, model: Any = None) -> tuple[Tensor, Tensor, Any]:
        """Log-probabilities and entropies [B, L − 1], 0 outside completions, and the output of `model` (the policy)."""
        inputs: dict[str, Any] = tensors.model_inputs()
        if loss.router_aux and self.moe:
            inputs["output_router_logits"] = True
        kept, predicting = tensors.predictions()  # prompts take no logits
        model = self.engine if model is None else model
        out = model(**inputs, use_cache=False, logits_to_keep=kept)
        targets = tensors.input_ids[:, 1:][tensors.completion]
        found, spread = processed_logprobs(
            # looked up: rows that share a prompt add their gradients of its last token in one order
            nn.functional.embedding(predicting, out.logits.flatten(0, 1)),
            targets,
            loss.temperature,
            loss.masked_ids,
            entropy_gradient=loss.entropy > 0,
        )
        shape = tensors.completion.shape
        logprobs = found.new_zeros(shape).masked_scatter(tensors.completion, found)
        entropy = spread.new_zeros(shape).masked_scatter(tensors.completion, spread)
        return logprobs, entropy, out

    def _require_finite(self, totals: _Totals, batch: Batch) -> None:
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
            f"the loss of optimizer step {batch.index} of {self.spec.model} is not finite in the micro-batches of "
            f"{', '.join(keys[:8])}{' …' if len(keys) > 8 else ''}; look at these rows and lower the learning rate"
        )

    def _require_finite_gradient(self, norm: float, index: int) -> None:
        """A ratio that overflows on its clipped side has a finite loss and no finite gradient."""
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of optimizer step {index} of {self.spec.model} has norm {norm}, though its loss is "
                "finite: policy and rollouts are too far apart; lower the learning rate or updates_per_step"
            )

    def _apply(self, index: int) -> tuple[float, float]:
        """Move the weights; the gradient's norm and the (largest) learning rate."""
        share = rate(index, self.spec.steps, self.spec.warmup, self.spec.schedule)
        for group, full in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = full * share
        # without ZeRO the engine clips but keeps the norm to itself
        grads = [p.grad for p in self.model.parameters() if p.grad is not None] if self.spec.zero_stage == 0 else []
        norm = nn.utils.get_total_norm(grads) if grads else None
        if norm is None:  # under ZeRO the norm is known after the step; raising still comes before any save
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            self._require_finite_gradient(float(norm), index)
        else:
            self._require_finite_gradient(float(norm), index)
            self.engine.step()
        return float(norm), max(self.spec.train.values()) * share

    def _gather(self, differences: list[Tensor]) -> tuple[list[float], list[bool]]:
        """[N] each, ranks in order: |trainer − engine| in nats, and whether a router was at a tie."""
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, torch.cat(differences, dim=1).cpu().numpy())
        gap, tied = np.concatenate(parts, axis=1)
        return gap.tolist(), (tied > 0).tolist()

    def losses(self, batch: Batch) -> dict[str, float]:
        totals = _Totals()
        with self.evaluating(), torch.no_grad():
            for samples in batch.micro_batches[self.rank]:
                tensors = collate(samples, self.visual).to(self.device)
                logprobs, _, _ = self._forward(tensors, Loss())
                counted = Tokens(logprobs, tensors.old_logprobs, tensors.advantages[:, None], tensors.mask)
                _, metrics = policy_loss(counted, Loss())
                totals.collect(metrics)
        reduced = totals.reduce(self.world_size)
        return {"loss": reduced["nll"], "tokens": reduced["tokens"]}

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

    def parts(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """(name, copy) of every parameter under the base model's names, in parts of about bucket_bytes; empty parts
        on ranks other than 0. Collective under ZeRO-3."""
        for names in _chunks(self._sources(), bucket_bytes):
            parameters = [p for _, needed in names for p in needed]
            with self._gathered(parameters):
                part = [(name, self._whole(name)) for name, _ in names] if self.rank == 0 else []
            yield part

    def _sources(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """Base name of every parameter, and the parameters needed to compute it."""
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
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
        return value.detach().to("cpu", copy=True)

    @contextmanager
    def _gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        if self.spec.zero_stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        own = {"random": torch.get_rng_state(), "world_size": self.world_size}
        torch.save(own, folder / f"rank-{self.rank}.pt")
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
        torch.set_rng_state(own["random"])

    def export(self, folder: Path) -> None:
        if self.spec.lora is None:
            tensors = {name: value for part in self.parts(1 << 30) for name, value in part}
        else:
            tensors = self._adapter()
        if self.rank == 0:
            self.model.save_pretrained(folder, state_dict=tensors, safe_serialization=True)
            self.processor.save_pretrained(folder)
        torch.distributed.barrier()

    def _adapter(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                with self._gathered([parameter]):
                    tensors[name] = parameter.detach().cpu().clone()
        return tensors

    def free(self) -> None:
        self.engine.destroy()
        del self.engine, self.model, self.reference, self._optimizer, self.visual, self.processor


class _Totals:
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
        """Over all ranks: means over tokens, but for the loss and router_aux, whose parts add up to them."""
        sums, maxima = dict(self.sums), dict(self.maxima)
        if world_size > 1:
            parts: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(parts, (sums, maxima))
            sums = {name: math.fsum(part[0].get(name, 0.0) for part in parts) for name in _keys(parts, 0)}
            maxima = {name: max(part[1].get(name, 0.0) for part in parts) for name in _keys(parts, 1)}
        tokens = sums.pop("tokens", 0.0)
        result = {name: value / max(1.0, tokens) for name, value in sums.items()}
        result |= {name: sums[name] for name in ("loss", "router_aux") if name in sums}
        return {**result, **maxima, "tokens": tokens}


def _keys(parts: Sequence[Any], index: int) -> list[str]:
    return sorted({name for part in parts for name in part[index]})


def _start(rank: int, world_size: int, address: str, threads: int, device: str, timeout: float) -> Any:
    """Join the process group, and return deepspeed, imported in its right environment."""
    host, _, port = address.rpartition(":")
    os.environ.update(
        DS_ACCELERATOR="cpu" if device == "cpu" else "cuda",
        RANK=str(rank),
        LOCAL_RANK="0" if device == "cpu" else str(torch.device(device).index or 0),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=host,
        MASTER_PORT=port,
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
    )
    if host in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    if device == "cpu":
        # DeepSpeed's Muon is compiled where it can be: 26 s, and a C++ compiler, for matrices this small
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    _need_no_compiler(deepspeed)
    deepspeed.init_distributed(
        dist_backend="gloo" if device == "cpu" else "nccl",
        auto_mpi_discovery=False,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
        verbose=False,
    )
    return deepspeed


def _need_no_compiler(deepspeed: Any) -> None:
    """DeepSpeed 0.19 on CPU builds its shared-memory communication op at start, which takes 40 s and fails without a
    C++ compiler; gloo gives bit-identical weights."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _prepare(spec: TrainSpec) -> tuple[Any, Any, Visual]:
    from rlhf import bridge
    from rlhf.foreign import open_model

    model, processor, visual = open_model(spec.model)
    if (spec.upcycle or spec.reset) and not isinstance(model, bridge.BridgeForConditionalGeneration):
        raise ValueError(f"{spec.model} is a {type(model).__name__}: `upcycle` and `reset` are for bridges only")
    if spec.upcycle is not None:
        model = bridge.upcycle(model, *spec.upcycle, spec.seed)
    if spec.reset:
        bridge.reset(model, spec.reset, spec.seed)
    if spec.packed:
        if not isinstance(model, bridge.BridgeForConditionalGeneration):
            raise ValueError(f"{spec.model} is a {type(model).__name__}: rows can be packed for bridges only")
        attend_by_row(model.model.language_model)
        visual = BridgeVisual(processor, packs=True)
    if spec.precision == "bfloat16":
        model = model.to(torch.bfloat16)
    return model, processor, visual


def _needs_copy(spec: TrainSpec) -> bool:
    return spec.reference and spec.lora is None


def _loop_over_experts(model: Any) -> None:
    """On CPU a loop over experts is the fastest of transformers' implementations ("batched_mm": 55 times slower).
    Written to the configs that the experts read: `set_experts_implementation` refuses a wrapper without experts."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"


def _adapt(model: nn.Module, spec: TrainSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    assert spec.lora is not None
    rank, alpha, targets = spec.lora
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    # the adapter names its base; a folder by its whole path, so that it opens from anywhere
    base = Path(spec.model)
    adapted.peft_config["default"].base_model_name_or_path = str(base.resolve()) if base.exists() else spec.model
    return adapted


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
        "steps_per_print": 1 << 30,
    }


def _chunks(
    sources: Iterator[tuple[str, list[nn.Parameter]]], limit: int
) -> Iterator[list[tuple[str, list[nn.Parameter]]]]:
    """Runs of parameters of about `limit` bytes, each at least one parameter."""
    chunk: list[tuple[str, list[nn.Parameter]]] = []
    size = 0
    for name, needed in sources:
        weight = sum(4 * _numel(p) for p in needed)
        if chunk and size + weight > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, needed))
        size += weight
    if chunk:
        yield chunk


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; ZeRO-3 leaves an empty tensor and the number in ds_numel."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()
