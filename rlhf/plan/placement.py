"""Processes and their shares of the machine: cores, host memory, GPU memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rlhf.architecture import GIB, activation_bytes, optimizer_bytes, weight_bytes
from rlhf.plan.cluster import Cluster
from rlhf.plan.types import ActorPlan, Memory, StagePlan
from rlhf.recipe import Evaluate, Merge, Optimised, Preference, Recipe, Rl, Stage, trains

# Measured on CPU, resident and proportional (PSS), before any weights: two engines and a trainer came to 4.4 GiB.
ENGINE_GIB, TRAINER_GIB, REWARD_GIB, DRIVER_GIB, RAY_GIB = 1.3, 1.0, 0.3, 0.6, 0.5
SCALAR_GIB = TRAINER_GIB  # it opens a model as a trainer does


def scalars_of(recipe: Recipe) -> int:
    """How many reward models score at once, at most: as many processes are kept room for."""
    return max(len(stage.scalars) for stage in recipe.stages)


def tenants_of(recipe: Recipe, cluster: Cluster, engines: int, scalars: int) -> int:
    """How many processes hold one GPU together: trainer ranks, reward models and all `engines` of the curriculum, over
    the GPUs there are. 0 on a CPU."""
    r = recipe.resources
    if r.device == "cpu":
        return 0
    return math.ceil((r.trainer_ranks + engines * r.tensor_parallel + scalars) / cluster.gpus)


def awake_of(stages: Sequence[StagePlan], tenants: int) -> int:
    """How many engines of a shared GPU may be awake at once: those of a stage, of those that stand there. The others
    sleep, as all do while the trainer works alone."""
    most = max((sum(use.workers for use in stage.engines) for stage in stages), default=0)
    return min(most, tenants - 1)


def memory_of(recipe: Recipe, stages: Sequence[StagePlan], tenants: int, copied: bool) -> Memory:
    """What all of it needs at the peak; what a process holds outside GPU memory counts on the host only. copied: a
    publish is a copy in GPU memory."""
    r = recipe.resources
    trainer = max((_trainer_bytes(recipe, stage) for stage in stages), default=0) / GIB
    offloaded = max((_optimizer_bytes(recipe, stage) for stage in stages), default=0) / GIB if r.offload else 0.0
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
    asleep = sum(number * weights[architecture] for architecture, number in cold) if tenants > 1 else 0.0
    # a publish lies once in shared memory or the object store while the engines read it
    published = max(weights.values(), default=0.0) * r.tensor_parallel * 4 / width
    base = DRIVER_GIB + RAY_GIB + r.reward_workers * REWARD_GIB
    base += r.trainer_ranks * TRAINER_GIB + processes * ENGINE_GIB * r.tensor_parallel
    scalars, scalar = scalars_of(recipe), _scalar_bytes(recipe, stages) / GIB
    base += scalars * SCALAR_GIB
    on_host = r.trainer_ranks * offloaded
    if r.device == "cpu":
        on_host = r.trainer_ranks * trainer + engines + scalars * scalar
    if copied:  # GPU to GPU, beside the rank's own
        return Memory(base + asleep + on_host, trainer + published, engine, scalar)
    return Memory(base + asleep + published + on_host, trainer, engine, scalar)


def _scalar_bytes(recipe: Recipe, stages: Sequence[StagePlan]) -> int:
    """Of the largest reward model that scores: its weights, and what a forward holds of a token budget, which is less
    than backward keeps of it when it computes layers anew."""
    r, named = recipe.resources, {name for stage in recipe.stages for name in stage.scalars}
    width = 4 if r.precision == "float32" else 2
    found = [stage.architecture for stage in stages if stage.name in named]
    return max((width * (a.parameters or 0) + activation_bytes(a, r.token_budget, True) for a in found), default=0)


def _trainer_bytes(recipe: Recipe, plan: StagePlan) -> int:
    """Of one rank: weights, gradients, activations, a copy of the model as reference and a critic where the stage has
    them, and the optimizer's state unless that is offloaded from a GPU."""
    r, (parameters, trainable) = recipe.resources, _parameters(recipe, plan)
    if not parameters:
        return 0
    held = weight_bytes(parameters, trainable, r.precision, r.zero_stage, r.trainer_ranks)
    optimizer = 0 if r.offload and r.device == "cuda" else _optimizer_bytes(recipe, plan)
    stage = _stage_of(recipe, plan)
    refers = isinstance(stage, Preference) or (isinstance(stage, Rl) and stage.kl is not None)
    copied = refers and isinstance(stage, Optimised) and (stage.lora is None or bool(stage.lora.whole))
    reference = parameters * (4 if r.precision == "float32" else 2) if copied else 0
    activations = activation_bytes(plan.architecture, min(r.token_budget, plan.tokens_per_update), r.checkpointing)
    critic = 0
    if _has_critic(stage):
        critic = weight_bytes(parameters, parameters, r.precision, r.zero_stage, r.trainer_ranks)
    return held + optimizer + reference + critic + activations


def _optimizer_bytes(recipe: Recipe, plan: StagePlan) -> int:
    r, (parameters, trainable) = recipe.resources, _parameters(recipe, plan)
    moved = trainable + (parameters if _has_critic(_stage_of(recipe, plan)) else 0)
    return optimizer_bytes(moved, r.precision, r.zero_stage, r.trainer_ranks)


def _has_critic(stage: Stage) -> bool:
    """Whether a second model trains beside the stage's, all of it."""
    return isinstance(stage, Rl) and stage.foretelling is not None


def _stage_of(recipe: Recipe, plan: StagePlan) -> Stage:
    return next(stage for stage in recipe.stages if stage.name == plan.name)


def _parameters(recipe: Recipe, plan: StagePlan) -> tuple[int, int]:
    """(held, trained) by the trainer in a stage; none where it does nothing or the model's size is not known."""
    stage, parameters = _stage_of(recipe, plan), plan.architecture.parameters
    measures = isinstance(stage, Merge) or (isinstance(stage, Evaluate) and stage.evaluate in ("loss", "pairs"))
    if measures and parameters is not None:  # looked at, as a stage that would train it
        return parameters, parameters
    if not isinstance(stage, Optimised) or not trains(stage) or parameters is None:
        return 0, 0
    adapters = None if stage.lora is None else plan.architecture.lora_parameters(stage.lora)
    if adapters is None:
        return parameters, parameters
    # how much `whole` names is known when the stage begins
    return parameters + adapters, adapters + (parameters if stage.lora is not None and stage.lora.whole else 0)


def too_large(
    recipe: Recipe, cluster: Cluster, tenants: int, awake: int, scalars: int, memory: Memory
) -> Iterator[str]:
    """Problems of fitting it into the memory there is, `scalars` reward models on a shared GPU, which never sleep."""
    r = recipe.resources
    advice = "lower resources.kv_cache_gib, token_budget or the number of workers"
    if memory.together > r.memory_gib:
        yield (
            f"the processes need about {memory.together:.1f} GiB, more than resources.memory_gib = {r.memory_gib:g}; "
            f"{advice}, or raise it"
        )
    elif memory.together > cluster.memory_gib:
        yield (
            f"the processes need about {memory.together:.1f} GiB, and this machine has {cluster.memory_gib:.1f}; "
            f"{advice}"
        )
    if r.device == "cuda" and tenants > 1 and r.tensor_parallel > 1:
        yield (
            f"{tenants} processes would share a GPU of the {cluster.gpus} here, which engines with "
            f"tensor_parallel = {r.tensor_parallel} cannot; use tensor_parallel = 1, or more GPUs"
        )
    if r.device == "cuda" and r.transport == "nccl" and tenants > 1:
        yield (
            f'resources.transport = "nccl": {tenants} processes would share a GPU of the {cluster.gpus} here, and two '
            'on one GPU can be in no NCCL group; use "auto", or more GPUs'
        )
    if r.device == "cuda" and r.transport == "ipc" and (tenants == 1 or r.trainer_ranks != cluster.gpus):
        yield (
            f'resources.transport = "ipc": an engine reads the weights of a trainer rank on its own GPU, and there are '
            f'{r.trainer_ranks} rank(s) for {cluster.gpus} GPU(s), {tenants} process(es) on each; use "auto"'
        )
    if r.device == "cuda" and cluster.gpu_memory_gib is not None:
        scoring = f", {scalars} reward model(s)" if scalars else ""
        together = f"a trainer rank{scoring} and {awake} engine(s) awake on one GPU"
        for who, needed in (
            ("a trainer rank", memory.trainer),
            ("an engine", memory.engine),
            ("a reward model", memory.scalar),
            *([(together, memory.trainer + scalars * memory.scalar + awake * memory.engine)] if tenants > 1 else []),
        ):
            if needed > cluster.gpu_memory_gib:
                yield (
                    f"{who} would need about {needed:.1f} GiB, and a GPU has {cluster.gpu_memory_gib:.1f}; {advice}, "
                    "or use more ranks with zero_stage = 3"
                )


def actors_of(
    recipe: Recipe, cluster: Cluster, engines: int, scalars: int, tenants: int, memory: Memory
) -> tuple[ActorPlan, ...]:
    """The processes of the whole curriculum, with `engines` engines and room for `scalars` reward models among them and
    `tenants` on each GPU."""
    r, cuda = recipe.resources, recipe.resources.device == "cuda"
    counts = {"trainer": r.trainer_ranks, "rollout": engines, "reward": r.reward_workers}
    total = sum(counts.values()) + scalars
    # phases mostly alternate: shares only have to add up to the machine, or Ray would not place the actors
    share = min(1.0, math.floor(100 * cluster.cpus / total) / 100)
    part = math.floor(100 / max(tenants, 1)) / 100 if cuda else 0.0
    # as many threads as the engine of a judge in its place would have
    scalar = ActorPlan("scalar", scalars, share, r.rollout_threads, part, SCALAR_GIB + memory.scalar)
    return (
        ActorPlan("trainer", counts["trainer"], share, r.trainer_threads, part, TRAINER_GIB + memory.trainer),
        ActorPlan("rollout", engines, share, r.rollout_threads, part * r.tensor_parallel, ENGINE_GIB + memory.engine),
        ActorPlan("reward", counts["reward"], share, 1, 0, REWARD_GIB),
        *([scalar] if scalars else []),
    )
