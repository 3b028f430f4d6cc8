"""How much memory each process of a recipe needs: on its host, and on each of its GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rlhf.architecture import GIB, Architecture
from rlhf.memory import (
    Serving,
    Sharding,
    bucket_bytes,
    gathered_bytes,
    gradient_bytes,
    kept_bytes,
    optimizer_bytes,
    row_bytes,
    served_bytes,
    weight_bytes,
    width_of,
    working_bytes,
)
from rlhf.plan.cluster import Cluster
from rlhf.plan.types import Parts, StagePlan, Transport
from rlhf.recipe import Evaluate, Merge, Optimised, Preference, Recipe, Rl, Stage, trains

# Measured on CPU, resident and proportional (PSS), before any weights: two engines and a trainer came to 4.4 GiB.
ENGINE_GIB, TRAINER_GIB, REWARD_GIB, DRIVER_GIB, RAY_GIB = 1.3, 1.0, 0.3, 0.6, 0.5
SCALAR_GIB = TRAINER_GIB  # it opens a model as a trainer does
CONTEXT_GIB = 1.0  # of a GPU, by any process on it: CUDA's context, kernels and NCCL's buffers; assumed, not measured


@dataclass(frozen=True)
class Sizes:
    """GiB of the processes of a recipe. On one GPU (without, on the host): a trainer rank, a GPU of an engine, a reward
    model; `copy`: of the trainer's, what it sends from. On the host: of each process of a role, engines in the order in
    which they start, and `published`, weights on their way."""

    trainer_parts: Parts
    engine_parts: Parts
    scalar: float
    copy: float
    hosts: Mapping[str, tuple[float, ...]]
    published: float


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


def awake_of(stages: Sequence[StagePlan]) -> int:
    """How many engines may be awake at once: those of a stage. On a GPU that several processes hold the others sleep,
    as all do while the trainer works alone."""
    return max((sum(use.workers for use in stage.engines) for stage in stages), default=0)


def sizes_of(recipe: Recipe, stages: Sequence[StagePlan], tenants: int, transport: Transport) -> Sizes:
    """What the processes need at the peak."""
    r, cuda = recipe.resources, recipe.resources.device == "cuda"
    context: Parts = (("CUDA", CONTEXT_GIB),) if cuda else ()
    ranks = [_rank(recipe, stage) for stage in stages]
    trainer = tuple((name, size / GIB) for name, size in max(ranks, key=lambda parts: sum(parts.values())).items())
    serving = serving_of(recipe)
    cold = [use.architecture for stage in stages for use in stage.engines for _ in range(use.cold)]
    engines = {architecture: _engine(architecture, serving, r.kv_cache_gib) for architecture in set(cold)}
    engine = max(engines.values(), key=lambda parts: sum(size for _, size in parts), default=())
    # a publish lies once in shared memory or the object store while engines read it, in float32; or in GPU memory
    weights = max((architecture.parameters or 0 for architecture in engines), default=0) / GIB
    copied = transport in ("ipc", "nccl")
    copy = width_of(r.precision) * weights if copied else 0.0
    scalar = _scalar(recipe, stages) / GIB
    opened = max((4 * held for held, _ in (_parameters(recipe, stage) for stage in stages)), default=0) / GIB
    if cuda:
        # whoever opens a model has it whole in float32 before it is on a GPU; states come to the host after that
        on_host = max(opened, max(_offloaded(recipe, stage) for stage in stages) / GIB if r.offload else 0.0)
        asleep = {a: r.tensor_parallel * served_bytes(a, serving) / GIB if tenants > 1 else 0.0 for a in engines}
        scored = max((4 * (a.parameters or 0) for a in _scored(recipe, stages)), default=0) / GIB
    else:
        on_host, scored = sum(size for _, size in trainer), scalar
        asleep = {architecture: sum(size for _, size in parts) for architecture, parts in engines.items()}
    return Sizes(
        trainer_parts=(*trainer, *context, *([("copy to send", copy)] if copy else [])),
        engine_parts=(*engine, *(context if engine else ())),
        scalar=scalar + (CONTEXT_GIB if cuda and scalars_of(recipe) else 0.0),
        copy=copy,
        hosts={
            "trainer": (TRAINER_GIB + on_host,) * r.trainer_ranks,
            "rollout": tuple(ENGINE_GIB * r.tensor_parallel + asleep[architecture] for architecture in cold),
            "reward": (REWARD_GIB,) * r.reward_workers,
            "scalar": (SCALAR_GIB + scored,) * scalars_of(recipe),
        },
        published=0.0 if copied else 4 * weights,
    )


def rows_at_once(recipe: Recipe, stages: Sequence[StagePlan]) -> tuple[int | None, list[str]]:
    """How many rows of max_model_len have their keys and values in an engine's cache at once, None where that is not
    known; and the problem, if that is not even one."""
    r, serving = recipe.resources, serving_of(recipe)
    longest = max((row_bytes(use.architecture, serving) for stage in stages for use in stage.engines), default=0)
    if not longest:
        return None, []
    rows = int(r.kv_cache_gib * GIB // longest)
    if rows:
        return rows, []
    return 0, [
        f"resources.kv_cache_gib = {r.kv_cache_gib:g} does not hold the keys and values of one row of max_model_len = "
        f"{r.max_model_len} ({longest / GIB:.2f} GiB a GPU), and an engine would not start; raise it"
    ]


def serving_of(recipe: Recipe) -> Serving:
    r = recipe.resources
    return Serving(r.precision, r.tensor_parallel, r.max_model_len, r.max_num_seqs)


def sharding_of(recipe: Recipe) -> Sharding:
    r = recipe.resources
    return Sharding(r.precision, r.zero_stage, r.trainer_ranks, r.offload and r.device == "cuda")


def _engine(architecture: Architecture, over: Serving, cache: float) -> Parts:
    return (
        ("weights", served_bytes(architecture, over) / GIB),
        ("keys and values", cache),
        ("a step", working_bytes(architecture, over) / GIB),
    )


def _scored(recipe: Recipe, stages: Sequence[StagePlan]) -> list[Architecture]:
    """Of the reward models that score."""
    named = {name for stage in recipe.stages for name in stage.scalars}
    return [stage.architecture for stage in stages if stage.name in named]


def _scalar(recipe: Recipe, stages: Sequence[StagePlan]) -> int:
    """Of the largest reward model that scores: its weights, and what a forward holds of a token budget, which is less
    than backward keeps of it when it computes layers anew."""
    r, width = recipe.resources, width_of(recipe.resources.precision)
    return max(
        (
            width * (found.parameters or 0) + kept_bytes(found, r.token_budget, r.precision, True, True)
            for found in _scored(recipe, stages)
        ),
        default=0,
    )


def _rank(recipe: Recipe, plan: StagePlan) -> dict[str, int]:
    """Bytes of one rank, where it computes: weights, gradients, activations, a copy of the model as reference and a
    critic where the stage has them, and the optimizer's state; gradients and state go to the host with offload."""
    r, (parameters, trainable) = recipe.resources, _parameters(recipe, plan)
    if not parameters:
        return {}
    over, stage = sharding_of(recipe), _stage_of(recipe, plan)
    refers = isinstance(stage, Preference) or (isinstance(stage, Rl) and stage.kl is not None)
    copied = refers and isinstance(stage, Optimised) and (stage.lora is None or bool(stage.lora.whole))
    held, moved = _held(recipe, plan)
    tokens = min(r.token_budget, plan.tokens_per_update)
    bucket = bucket_bytes(over)
    return {
        "weights": weight_bytes(held, over) + gathered_bytes(parameters, over),
        "gradients": 0 if over.offload else gradient_bytes(moved, over),
        "optimizer": 0 if over.offload else optimizer_bytes(moved, over, _by_muon(stage, plan)),
        "reduced at once": bucket if r.device == "cuda" else min(bucket, 4 * trainable),
        "reference": over.width * parameters if copied else 0,
        "activations": kept_bytes(plan.architecture, tokens, r.precision, r.checkpointing, _encodes(stage)),
    }


def _offloaded(recipe: Recipe, plan: StagePlan) -> int:
    """Bytes of gradients and state that a rank leaves to the host."""
    over, stage = sharding_of(recipe), _stage_of(recipe, plan)
    _, moved = _held(recipe, plan)
    return over.split(4 * moved, 1) + optimizer_bytes(moved, over, _by_muon(stage, plan))


def _held(recipe: Recipe, plan: StagePlan) -> tuple[int, int]:
    """(held, trained) with those of a second model that trains beside the stage's, all of it: a critic."""
    parameters, trainable = _parameters(recipe, plan)
    stage = _stage_of(recipe, plan)
    critic = parameters if isinstance(stage, Rl) and stage.foretelling is not None else 0
    return parameters + critic, trainable + critic


def _by_muon(stage: Stage, plan: StagePlan) -> int:
    """How many parameters learn by Muon, nearly: where everything trains, all but the tables of tokens."""
    if not isinstance(stage, Optimised) or stage.muon is None or stage.lora is not None or stage.train is not None:
        return 0
    decoder = plan.architecture.plain_decoder
    tables = 2 * decoder.get("vocab_size", 0) * decoder.get("hidden_size", 0)
    return max(0, (plan.architecture.parameters or 0) - tables)


def _encodes(stage: Stage) -> bool:
    """Whether the vision encoder may train, and backward goes through it."""
    return not isinstance(stage, Optimised) or _may_train(stage, "vision")


def _may_train(stage: Optimised, *names: str) -> bool:
    """Whether something may train that lies in a part of the model of one of these names."""
    globs = stage.train if stage.lora is None else stage.lora.whole
    return globs is None or any(fnmatchcase(name, glob.partition(".")[0]) for name in names for glob in globs)


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
    parts = plan.architecture.parts
    if stage.lora is None and parts is None:
        return parameters, parameters
    names = {"decoder": ("language_model", "lm_head")}
    # of a part that a glob goes deeper into, all: how much that is, is known when the stage begins
    whole = sum(size for part, size in (parts or {}).items() if _may_train(stage, *names.get(part, (part,))))
    if stage.lora is None:
        return parameters, whole
    adapters = plan.architecture.lora_parameters(stage.lora)
    if adapters is None:
        return parameters, parameters
    return parameters + adapters, adapters + whole
