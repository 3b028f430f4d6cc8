"""From a plan to live actors and back: the one place that starts and ends processes.

Engines outlive stages: a model of an architecture that is already served is loaded as weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.artifacts import read_weights
from actors.device import Copies, Line, SentBucket, listen
from actors.drain import watched
from actors.handles import CALLS, EngineHandle, RewardsHandle, ScalarHandle, TrainerHandle, reason, within
from actors.huggingface import HuggingFaceWorker
from actors.imports import in_place
from actors.reward import RewardWorker
from actors.rollout import EngineSettings, RolloutWorker
from actors.scorer import Scorer, ScorerSettings
from actors.shared import Owner
from actors.trainer import TrainerRank
from actors.vllm_worker import VllmWorker
from actors.waiting import free_of, granted, require_possible
from rewards.isolation import Limits
from rlhf.architecture import GIB, base_of, from_folder
from rlhf.models import architecture_as_saved, load_processor, masked_ids
from rlhf.plan import Cluster, Node, Plan, gathered, reserved
from rlhf.preemption import Preemption
from rlhf.recipe import Implementation, Recipe
from rlhf.stage import packs
from rlhf.types import Publication

BUCKET_BYTES = 64 * 2**20
GROUP = "trainer"  # the line by which trainer ranks find each other


class Loading(RolloutWorker):
    """A rollout worker that loads what was published, or reads an artifact's weights."""

    def fetch(self, publication: Publication) -> float:
        """Load a publication; returns the engine's seconds."""
        return self.load(publication, publication.buckets).seconds

    def open(self, folder: str, version: int) -> float:
        """Load an artifact's weights from its folder; returns the engine's seconds."""
        weights = read_weights(Path(folder))
        names = {name: tuple(array.shape) for name, array in weights}
        return self.load(Publication(version, (), names), [weights]).seconds


class VllmActor(Loading, VllmWorker):
    """One whose engine is vLLM's."""


class HuggingFaceActor(Loading, HuggingFaceWorker):
    """One whose engine is transformers."""


class TrainerActor(TrainerRank):
    """A trainer rank that hands out its weights, by the transport that is asked for."""

    def publication(self, version: int, transport: str) -> Publication:
        """Rank 0's answer holds the buckets, by ipc every rank's those of its GPU; others take part in gathering."""
        names: dict[str, tuple[int, ...]] = {}
        sent: list[Any] = []
        if transport in ("ipc", "nccl"):
            for part in self.parts(BUCKET_BYTES, everywhere=transport == "ipc"):
                names |= {name: tuple(value.shape) for name, value in part}
                size, places = self._copies.put(len(sent), part)
                shared = transport == "ipc"
                sent.append(self._copies.shared(len(sent), places) if shared else SentBucket(size, places))
            self._copies.finish()
        else:
            for bucket in self.buckets(BUCKET_BYTES):
                names |= {name: tuple(array.shape) for name, array in bucket}
                sent.append(self._shared.put(len(sent), bucket) if transport == "shm" else ray.put(bucket))
            self._shared.trim(len(sent))
        self._sent = sent
        return Publication(version, tuple(sent), names)

    def listen(self, line: str, timeout: float) -> str:
        """Where an engine finds the line of that name: "host:port"."""
        host = ray.util.get_node_ip_address()
        self._stores[line] = listen(host, timeout)
        return f"{host}:{self._stores[line].port}"

    def meet(self, address: str) -> None:
        """Join the process group at rank 0's `address`. Nobody waits for this: what goes wrong is raised by the next
        call."""
        try:
            self.join(address)
        except (RuntimeError, ValueError, OSError) as error:
            self.failure = error

    def connect(self, line: str, size: int, timeout: float) -> None:
        """Wait for the engine's end of the line."""
        self._lines[line] = Line(self._stores[line], 0, size, self.device, timeout)

    def send(self, line: str) -> None:
        """Send every bucket of the latest publication."""
        for index, bucket in enumerate(self._sent):
            self._lines[line].send(self._copies.sent(index, bucket.size))

    def hang_up(self, line: str) -> None:
        """Forget a line whose engine is gone."""
        self._lines.pop(line, None)
        self._stores.pop(line, None)

    @cached_property
    def _shared(self) -> Owner:
        return Owner()

    @cached_property
    def _copies(self) -> Copies:
        return Copies(self.device, BUCKET_BYTES)

    @cached_property
    def _stores(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _lines(self) -> dict[str, Line]:
        return {}


def _free() -> str:
    """What of the cluster nobody has reserved, in words."""
    free, total = ray.available_resources(), ray.cluster_resources()
    return free_of({name: (free.get(name, 0.0), amount) for name, amount in total.items()})


@dataclass
class Placement:
    """Where actors stand: a placement group with the plan's bundles (`reserved`)."""

    recipe: Recipe
    plan: Plan
    group: Any
    bundles: dict[str, list[int]]
    implementation: Implementation  # of the engines to start

    @classmethod
    async def reserve(cls, recipe: Recipe, plan: Plan) -> Placement:
        """Reserve every process's share at once, so that a job never half-starts and no two wait for each other.

        Raises PlanError when the cluster could never hold them, ActorTimeoutError when it cannot in deadlines.queue.
        """
        shares, bundles = reserved(plan.actors, plan.shared_gpus)
        require_possible(shares, _alive())
        group = placement_group(shares, strategy="PACK")
        await granted(group.ready(), shares, recipe.deadlines.queue, _free)
        found = placement_group_table(group)["bundles_to_node_id"]
        bundles = gathered(shares, bundles, [found[index] for index in range(len(shares))])
        return cls(recipe, plan, group, bundles, plan.implementation)

    def options(self, role: str, index: int, **more: Any) -> dict[str, Any]:
        """Ray options of the role's process `index`: its bundle, its shares, its OpenMP threads."""
        actor = next(actor for actor in self.plan.actors if actor.role == role)
        environment = {name: str(actor.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        strategy = PlacementGroupSchedulingStrategy(self.group, self.bundles[role][index])
        return {
            "num_cpus": actor.cpus,
            "num_gpus": actor.gpus,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": environment},
            **more,
        }

    def rollout(self, index: int, folder: Path) -> Any:
        """Start a rollout worker that serves the model in folder."""
        resources = self.recipe.resources
        settings = EngineSettings(
            dtype=resources.precision,
            max_model_len=resources.max_model_len,
            max_num_seqs=resources.max_num_seqs,
            kv_cache_gib=resources.kv_cache_gib,
            threads=resources.rollout_threads,
            seed=self.recipe.seed,
            # a bridge is registered with vLLM as its Transformers backend, and known by no other name
            implementation="auto" if from_folder(folder).is_bridge else self.implementation,
            tensor_parallel=resources.tensor_parallel,
            device=resources.device,
            masked_tokens=masked_ids(load_processor(folder)),
            sleeps=self.plan.colocated,
            deadline=self.recipe.deadlines.generate,
            start_deadline=self.recipe.deadlines.start,
        )
        options = self.options("rollout", index, max_concurrency=CALLS + 8)
        kind = HuggingFaceActor if self.implementation == "huggingface" else VllmActor
        return ray.remote(kind).options(**options).remote(str(folder), settings)

    def reward(self, index: int) -> Any:
        limits = Limits(self.recipe.deadlines.reward, self.recipe.resources.reward_memory_gib)
        return ray.remote(RewardWorker).options(**self.options("reward", index)).remote(limits)

    def scalar(self, index: int, folder: Path) -> Any:
        """Start a reward model from its artifact."""
        resources = self.recipe.resources
        settings = ScorerSettings(
            precision=resources.precision,
            token_budget=resources.token_budget,
            packed=packs(self.recipe, folder),
            threads=resources.rollout_threads,
            device=resources.device,
        )
        return ray.remote(Scorer).options(**self.options("scalar", index)).remote(str(folder), settings)

    def trainer(self) -> list[Any]:
        """Start all trainer ranks, which join in one process group."""
        resources, deadlines = self.recipe.resources, self.recipe.deadlines
        # a rank that waits in a collective longer than any call may take waits for a dead one
        timeout = max(deadlines.start, deadlines.step, deadlines.sync, deadlines.save)
        ranks = [
            ray.remote(TrainerActor)
            .options(**self.options("trainer", rank))
            .remote(rank, resources.trainer_ranks, None, resources.trainer_threads, resources.device, timeout)
            for rank in range(resources.trainer_ranks)
        ]
        address = ranks[0].listen.remote(GROUP, timeout)
        for rank in ranks:
            rank.meet.remote(address)
        return ranks


@dataclass
class Cast:
    """Everything that is running for a job (rlhf.roles.Actors)."""

    placement: Placement
    trainer: TrainerHandle
    rewards: RewardsHandle
    engines: list[EngineHandle] = field(default_factory=list)

    @property
    def cold_starts(self) -> int:
        return sum(len(engine.workers) + engine.restarts for engine in self.engines)

    async def renew_trainer(self) -> None:
        for rank in self.trainer.ranks:
            ray.kill(rank)
        self.trainer.ranks = self.placement.trainer()

    def dismiss(self) -> None:
        """End all engines: the next that are asked for start anew."""
        for engine in self.engines:
            engine.dismiss()
        self.engines.clear()

    @contextlib.asynccontextmanager
    async def serving(self, models: Mapping[str, Path]) -> AsyncIterator[Mapping[str, EngineHandle]]:
        engines: dict[str, EngineHandle] = {}
        for role, folder in models.items():
            engines[role] = await self._engine(role, folder, list(engines.values()))
        yield engines
        for engine in engines.values():
            await engine.sleep()

    @contextlib.asynccontextmanager
    async def scoring(self, models: Mapping[str, Path]) -> AsyncIterator[None]:
        """A process for each reward model, ended with the context: the next stage's are others."""
        deadlines, scalars = self.placement.recipe.deadlines, self.rewards.scalars
        try:
            for index, (name, folder) in enumerate(models.items()):
                start = partial(self.placement.scalar, index, folder)
                scalars[name] = ScalarHandle(name, start, deadlines, start())
            await asyncio.gather(*(scalar.ready() for scalar in scalars.values()))
            yield
        finally:
            for scalar in scalars.values():
                ray.kill(scalar.worker)
            scalars.clear()

    async def _engine(self, role: str, folder: Path, busy: list[EngineHandle]) -> EngineHandle:
        kind = architecture_as_saved(folder).digest
        for engine in self.engines:
            if engine.architecture == kind and engine not in busy:
                await engine.open(folder)
                return engine
        first = sum(len(engine.workers) for engine in self.engines)
        count = self.placement.recipe.resources.rollout_workers if role == "policy" else 1
        deadlines = self.placement.recipe.deadlines
        sleeps = self.placement.plan.colocated
        engine = EngineHandle(
            role, folder, kind, lambda i, path: self.placement.rollout(first + i, path), deadlines, sleeps=sleeps
        )
        engine.workers = [engine.start(index, base_of(folder)) for index in range(count)]
        what = f"engine {role!r} starting on {folder}"
        try:
            await asyncio.gather(
                *(within(deadlines.start, "start", what, worker.heartbeat.remote()) for worker in engine.workers)
            )
        except BaseException:
            engine.dismiss()
            raise
        self.engines.append(engine)
        if base_of(folder) == folder:
            await engine.prove_artifact()
        else:  # adapters: vLLM starts on their base and takes the merged weights
            await engine.open(folder)
        return engine


def cluster_of(address: str) -> Cluster:
    """The nodes of the running Ray cluster at `address`; Ray does not know the memory of its GPUs."""
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        return Cluster(tuple(_alive()))
    finally:
        ray.shutdown()


def _alive() -> list[Node]:
    return [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _node(found: Mapping[str, float]) -> Node:
    memory = found.get("memory", 0.0) + found.get("object_store_memory", 0.0)
    return Node(int(found.get("CPU", 0)), memory / GIB, int(found.get("GPU", 0)))


@contextlib.asynccontextmanager
async def launch(
    recipe: Recipe, plan: Plan, address: str | None = None, preemption: Preemption | None = None
) -> AsyncIterator[Cast]:
    """Start Ray (or join the cluster at `address`), trainer ranks and reward workers; end all of it on leaving. The
    `preemption` is asked for when a machine that any of them stands on is drained.

    `actors.security.ray_environment` must be in the environment before this module is imported.
    """
    local: dict[str, Any] = {}
    if address is None:
        here = in_place(Path.cwd())
        local = {"num_cpus": plan.cluster.cpus, "include_dashboard": False, "runtime_env": here}
    with _own_signals(), _apart() if address is None else contextlib.nullcontext():
        ray.init(
            address=address or "local", log_to_driver=False, configure_logging=False, namespace=recipe.name, **local
        )
    try:
        placement = await Placement.reserve(recipe, plan)
        async with watched(placement.group, preemption) if preemption else contextlib.nullcontext():
            ranks = placement.trainer()
            workers = [placement.reward(index) for index in range(recipe.resources.reward_workers)]
            rewards = RewardsHandle(placement.reward, recipe.deadlines, workers)
            lines = 1 + recipe.resources.tensor_parallel
            yield Cast(placement, TrainerHandle(ranks, recipe.deadlines, plan.transport, lines), rewards)
    except RayActorError as error:  # a process that nobody replaces; Ray's error is no RuntimeError
        raise RuntimeError(f"a process of the run died: {reason(error)}") from error
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray's core takes SIGTERM for itself when it starts, and would abort the driver, which has contexts to leave."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Processes that are started inside are not of this process's group. `timeout`, a terminal or a batch system may
    send a signal to all of a group: the driver is to hear of it, and Ray's own processes would end, before there is a
    checkpoint. Ray puts its workers into groups of their own, and has no option to do so with the others."""
    ours = os.getpgrp()
    if os.getsid(0) == os.getpid():  # who leads a session cannot leave its group
        yield
        return
    idle = partial(subprocess.Popen, ["/bin/cat"], stdin=subprocess.PIPE)
    with idle() as kept, idle(process_group=0) as leader:  # the first so that there is a group to come back to
        os.setpgid(0, leader.pid)
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # whoever led it took it along
                os.setpgid(0, ours)
            if kept.poll() == -signal.SIGINT:  # Ctrl-C meanwhile reached that group, without us
                os.kill(os.getpid(), signal.SIGINT)
