"""One DeepSpeed rank: the optimizer steps, the weights to publish, the checkpoints. With `actors.learner` and
`actors.optimizer` the home of deepspeed.

Every method of TrainerRank is collective: the driver calls it on all ranks at once with equal arguments. A loss that is
not finite is raised on all of them; any other error on its own rank, while the others may wait for it in a collective.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.aligner import Aligner
from actors.critic import Critic
from actors.learner import TrainInfo
from actors.policy import Policy
from actors.reward_model import RewardModel
from actors.shared import Bucket
from rlhf.types import Batch, Fit, Probe, ProbeScores, StepStats, TrainSpec

CRITIC = "critic"  # where a checkpoint has it


class TrainerRank:
    """Rank `rank` of `world_size`. Constructing it joins the process group at `address` ("host:port"); without one,
    `join` does. Every collective is left with an error after `timeout` seconds. One per process; `begin` may be called
    again. `failure`: why it has joined no group."""

    def __init__(
        self, rank: int, world_size: int, address: str | None, threads: int, device: str = "cpu", timeout: float = 300.0
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._deepspeed: Any = None
        self.failure: Exception | None = None
        self._threads, self._timeout = threads, timeout
        self._stage: Policy | None = None
        self._critic: Critic | None = None
        if address is not None:
            self.join(address)

    def join(self, address: str) -> None:
        """Join the process group, in which rank 0 listens at `address`."""
        self._deepspeed = _start(self.rank, self.world_size, address, self._threads, str(self.device), self._timeout)

    def begin(self, spec: TrainSpec) -> TrainInfo:
        """Load spec.model and make it ready to train. Raises ValueError for globs that match nothing, and for an
        upcycling or reset the model does not support."""
        self.end()
        if self._deepspeed is None:
            raise RuntimeError(f"trainer rank {self.rank} is in no process group: {self.failure or 'call join first'}")
        kind = RewardModel if spec.scalar else Aligner if spec.objectives else Policy
        self._stage = kind(self._deepspeed, spec, self.rank, self.world_size, self.device)
        if spec.critic is not None:
            self._critic = Critic(self._deepspeed, spec, self.rank, self.world_size, self.device)
        return self._stage.info

    def step(self, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        """One optimizer step; `fresh`: the weights are those that sampled the batch's current rows, whose
        log-probabilities are compared with the engine's; not `alone`: on spec.beside threads. Raises FloatingPointError
        naming step and samples if a loss is not finite; the policy is then as before."""
        with self._threaded(alone):
            learned = {} if self._critic is None else self._critic.step(batch)
            stats = self._begun.step(batch, fresh)
            return replace(stats, metrics={**stats.metrics, **learned})

    def losses(self, batch: Batch) -> dict[str, Fit]:
        """Of this rank's samples, by key: how well the policy fits their learned tokens; temperature 1, nothing masked,
        no gradient."""
        return self._begun.losses(batch)

    def divergences(self, batch: Batch, estimator: str) -> dict[str, float]:
        """Of this rank's samples, by key: the divergence from the reference at their sampled tokens under the policy
        that sampled them, summed, in nats. Needs a spec with `reference`."""
        return self._begun.divergences(batch, estimator)

    def logprobs(self, batch: Batch) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """Of this rank's samples, by key: the log-probabilities of the completion tokens under the policy and under its
        reference. Needs a spec with `reference`."""
        return self._begun.logprobs(batch)

    def values(self, batch: Batch, alone: bool = True) -> dict[str, tuple[float, ...]]:
        """Of this rank's samples, by key: what the critic says before each completion token; `alone` as for `step`.
        Needs a spec with `critic`."""
        if self._critic is None:
            raise RuntimeError("this stage has no critic: its spec has critic = None")
        with self._threaded(alone):
            return self._critic.values(batch)

    def rewards(self, batch: Batch) -> dict[str, float]:
        """Of this rank's samples, by key: what the reward model says of the reply. Needs a spec with `scalar`."""
        if not isinstance(self._begun, RewardModel):
            raise RuntimeError("this stage trains no reward model: its spec has no scalar")  # noqa: TRY004 - state
        return self._begun.rewards(batch)

    def probe(self, probes: Sequence[Probe], alone: bool = True) -> ProbeScores:
        """The trainer's log-probabilities on fixed sequences; `alone` as for `step`."""
        from rlhf.agreement import probe_model

        with self._threaded(alone), self._begun.evaluating() as (model, processor, visual):
            return probe_model(model, processor, visual, probes)

    def fingerprints(self, probes: Sequence[Probe]) -> Any:
        """Outputs of every module on fixed sequences, to find where an engine differs."""
        from rlhf.agreement import fingerprint_model

        with self._begun.evaluating() as (model, processor, visual):
            return fingerprint_model(model, processor, visual, probes)

    def parts(self, bucket_bytes: int, everywhere: bool = False) -> Iterator[list[tuple[str, Tensor]]]:
        """All parameters, whole, LoRA merged, under the model's own names, in parts of about bucket_bytes each, on this
        rank's device. A part is good until the next is asked for. On rank 0, or `everywhere`; other ranks take part, to
        the end, and get empty ones."""
        return self._begun.parts(bucket_bytes, everywhere)

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """Parts in host memory, bfloat16 as its bits in uint16; on rank 0 only."""
        for part in self.parts(bucket_bytes):
            if self.rank == 0:
                yield [(name, _as_array(value.cpu())) for name, value in part]

    def weights(self, bucket_bytes: int) -> list[Bucket]:
        """Copies of `buckets`."""
        return [[(name, array.copy()) for name, array in bucket] for bucket in self.buckets(bucket_bytes)]

    def save(self, folder: str | Path) -> None:
        """Write weights, optimizer and random state into an existing or new folder. Atomic naming is the caller's."""
        self._begun.save(Path(folder))
        if self._critic is not None:
            self._critic.save(Path(folder) / CRITIC)

    def restore(self, folder: str | Path) -> None:
        """Continue bit-exactly from what `save` wrote, after `begin` with the same spec on as many ranks.

        DeepSpeed's files are pickles: verify that they are your own before calling. Raises ValueError if the folder
        holds no checkpoint of this world size."""
        self._begun.restore(Path(folder))
        if self._critic is not None:
            self._critic.restore(Path(folder) / CRITIC)

    def export(self, folder: str | Path) -> None:
        """Write the model and its processor as a Hugging Face folder; with LoRA the adapter alone, in peft's format,
        naming its base; a reward model whole, how it is asked and its head, if it has one, in a file of its own
        (`actors.scalar`)."""
        self._begun.export(Path(folder))

    def end(self) -> None:
        """Free model and optimizer; the process group stays for the next `begin`."""
        for learner in (self._stage, self._critic):
            if learner is not None:
                learner.free()
        self._stage = self._critic = None
        gc.collect()

    def close(self) -> None:
        """End the stage and leave the process group."""
        self.end()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @contextmanager
    def _threaded(self, alone: bool) -> Iterator[None]:
        """On as many threads as there are, or those of spec.beside."""
        torch.set_num_threads(self._threads if alone else self._begun.spec.beside or self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    @property
    def _begun(self) -> Policy:
        if self._stage is None:
            raise RuntimeError("no stage has begun on this trainer: call begin(spec) first")
        return self._stage


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


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
