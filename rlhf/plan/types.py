"""A plan in numbers. Counts are upper bounds where they depend on what is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.architecture import Architecture
from rlhf.plan.cluster import Cluster, Node
from rlhf.recipe import Implementation

Transport = Literal["shm", "cpu", "ipc", "nccl"]


class PlanError(ValueError):
    """A recipe that cannot run; the message has one problem a line, each saying what to change. `changes`: where it
    does not fit, overrides of the recipe with which it would on `nodes` nodes, there and more of the same kind."""

    def __init__(self, message: str, changes: tuple[str, ...] = (), nodes: int = 0) -> None:
        super().__init__(message)
        self.changes, self.nodes = changes, nodes


class MisfitError(PlanError):
    """One for which there is no room, or too little memory: another size or cluster may do."""


@dataclass(frozen=True)
class ActorPlan:
    """`count` processes of one role. cpus: Ray's share of each, in cores; threads: OpenMP threads of each, which may
    add up to more than the cores where phases alternate (where they do not: trainer_threads_beside); gpus: Ray's share
    of each, a fraction where several processes hold one GPU together; memory_gib: of each on the host, gpu_memory_gib:
    of each on every GPU it has, both estimates at the peak, of the largest of the role."""

    role: str
    count: int
    cpus: float
    threads: int
    gpus: float
    memory_gib: float
    gpu_memory_gib: float = 0.0


Parts = tuple[tuple[str, float], ...]  # GiB by what they are for


@dataclass(frozen=True)
class Memory:
    """GiB at the peak. together: all processes, in host memory; trainer, engine and scalar: the weights, states and
    caches of one rank, of one GPU of an engine and of one reward model, in host memory on a CPU and in GPU memory on
    CUDA; *_parts: what these are of."""

    together: float
    trainer_parts: Parts
    engine_parts: Parts
    scalar: float = 0.0

    @property
    def trainer(self) -> float:
        return sum(size for _, size in self.trainer_parts)

    @property
    def engine(self) -> float:
        return sum(size for _, size in self.engine_parts)


@dataclass(frozen=True)
class NodePlan:
    """What stands on one node. processes: how many of each role; memory_gib: what they need of the host; gpus: GiB
    needed of each GPU in use, none where device = "cpu"."""

    node: Node
    processes: tuple[tuple[str, int], ...]
    memory_gib: float
    gpus: tuple[float, ...]


@dataclass(frozen=True)
class EngineUse:
    """Engines a stage asks of: `workers` of them, `cold` of which start for it; the others get new weights."""

    role: str
    architecture: Architecture
    workers: int
    cold: int
    verdict: str


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers. Counts are for the whole stage unless the name says otherwise; tokens are upper bounds.

    start            stage whose model it continues, None for [model]
    algorithm        of an rl stage, with "auto" resolved; None elsewhere or when the architecture is unknown
    rows_per_update  rows of one optimizer step; micro_batches: on each rank in one optimizer step, of longest rows
    rollouts_per_step  completions between two publishes; rollouts: of the whole stage; both without refills
    evaluation_rollouts  completions of the evaluation after the stage
    """

    name: str
    kind: str
    start: str | None
    architecture: Architecture
    algorithm: str | None
    optimizer_steps: int
    rows_per_update: int
    tokens_per_update: int
    micro_batches: int
    rollouts_per_step: int
    rollouts: int
    evaluation_rollouts: int
    engines: tuple[EngineUse, ...]
    budget_minutes: float | None

    @property
    def cold_starts(self) -> int:
        return sum(engine.cold for engine in self.engines)


@dataclass(frozen=True)
class Plan:
    """Everything derived from a recipe for a cluster.

    world_size   trainer ranks; transport: how weights reach the engines; colocated: engines and trainer share GPUs
    memory       an estimate; memory_limit_gib: what the recipe allows of it on the host
    nodes        what stands where, as Ray packs the job's placement group; nodes without a process are left out
    longest_rows rows of max_model_len whose keys and values one engine holds at once; None where that is not known
    """

    recipe: str
    cluster: Cluster
    actors: tuple[ActorPlan, ...]
    stages: tuple[StagePlan, ...]
    world_size: int
    transport: Transport
    colocated: bool
    implementation: Implementation
    memory: Memory
    memory_limit_gib: float
    nodes: tuple[NodePlan, ...]
    longest_rows: int | None
    budget_minutes: float | None
    notes: tuple[str, ...]

    @property
    def on_gpus(self) -> bool:
        return any(actor.gpus for actor in self.actors)

    @property
    def shared_gpus(self) -> int:
        """How many GPUs trainer and engines hold together; 0 where each process has its own."""
        return self.cluster.gpus if self.colocated else 0

    @property
    def cold_starts(self) -> int:
        """Engine processes that start during the whole curriculum."""
        return sum(stage.cold_starts for stage in self.stages)
