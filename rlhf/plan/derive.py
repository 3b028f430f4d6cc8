"""From a recipe and a cluster to a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rlhf.architecture import GIB, Architecture, algorithm_of, architecture_of
from rlhf.memory import row_bytes
from rlhf.plan import feasibility
from rlhf.plan.advice import Needs, advice
from rlhf.plan.cluster import Cluster
from rlhf.plan.engines import engine_uses
from rlhf.plan.nodes import gpu_needs, homeless, node_plans, seated, too_large
from rlhf.plan.placement import awake_of, rows_at_once, scalars_of, serving_of, sizes_of, tenants_of
from rlhf.plan.refusals import crowded_cores, misplaced, missing_gpus, undivided, unenforced, unfit_stages, unshared
from rlhf.plan.types import EngineUse, Memory, MisfitError, NodePlan, Plan, PlanError, StagePlan, Transport
from rlhf.plan.verdicts import Verdict, chosen
from rlhf.recipe import Evaluate, Merge, Pairs, Rebuild, Recipe, Rl, Sft, Stage, Synthesize

MOST_RANKS = 512  # of which advice tells


def make_plan(recipe: Recipe, cluster: Cluster | None = None, verdicts: Sequence[Verdict] = ()) -> Plan:
    """Derive the plan of a recipe on a cluster (default: this machine).

    Raises PlanError with every problem of the first kind that there is (`check`, then the machine, then its room and
    memory), each in a sentence that says what to change; where memory or room is short, with what would fit.
    """
    cluster = cluster or Cluster.here()
    architectures = check(recipe)
    try:
        return _planned(recipe, cluster, architectures, verdicts)
    except MisfitError as error:

        def trial(changed: Recipe, on: Cluster) -> Plan:
            _refuse(unfit_stages(changed, architectures))
            return _planned(changed, on, architectures, verdicts)

        found = advice(recipe, cluster, _needs(recipe, architectures, verdicts), trial)
        raise PlanError(f"{error}\n{found}", found.changes, found.nodes) from None


def _planned(
    recipe: Recipe, cluster: Cluster, architectures: Mapping[str, Architecture], verdicts: Sequence[Verdict]
) -> Plan:
    _refuse(misplaced(recipe, cluster), crowded_cores(recipe, cluster), undivided(recipe, architectures))
    _refuse(missing_gpus(recipe, cluster), error=MisfitError)
    # one kind of engine for all stages: transformers serves what vLLM can, too
    served = sorted(architectures.values(), key=lambda architecture: architecture.served == "vllm")
    implementation = chosen(recipe.model.implementation, served[0], verdicts)
    _refuse(unenforced(recipe, architectures, implementation))
    uses = engine_uses(recipe, architectures, implementation, verdicts)
    stages = tuple(_stage(recipe, stage, architectures[stage.name], uses[stage.name]) for stage in recipe.stages)
    engines, scalars = sum(stage.cold_starts for stage in stages), scalars_of(recipe)
    tenants = tenants_of(recipe, cluster, engines, scalars)
    _refuse(unshared(recipe, cluster, tenants), error=MisfitError)
    transport = _transport(recipe, cluster, tenants > 1)
    sizes = sizes_of(recipe, stages, tenants, transport)
    seating = seated(recipe, cluster, engines, scalars, tenants, sizes)
    _refuse(homeless(cluster, seating), error=MisfitError)
    needs = gpu_needs(seating, awake_of(stages) if tenants > 1 else 0, transport, sizes)
    nodes = tuple(node_plans(cluster, seating, needs, transport, sizes))
    longest_rows, short = rows_at_once(recipe, stages)
    _refuse(short, too_large(recipe, cluster, seating, nodes, needs), error=MisfitError)
    resources = recipe.resources
    return Plan(
        recipe=recipe.name,
        cluster=cluster,
        actors=seating.actors,
        stages=stages,
        world_size=resources.trainer_ranks,
        transport=transport,
        colocated=tenants > 1,
        implementation=implementation,
        memory=Memory(sum(n.memory_gib for n in nodes), sizes.trainer_parts, sizes.engine_parts, sizes.scalar),
        memory_limit_gib=resources.memory_gib,
        nodes=nodes,
        longest_rows=longest_rows,
        budget_minutes=recipe.budget_minutes,
        notes=tuple(_notes(recipe, stages, nodes)),
    )


def _needs(recipe: Recipe, architectures: Mapping[str, Architecture], verdicts: Sequence[Verdict]) -> Needs:
    """What any size of a recipe has to have room for."""
    smallest = {"rollout_workers": 1, "tensor_parallel": 1}
    one = recipe.model_copy(update={"resources": recipe.resources.model_copy(update=smallest)})
    uses = engine_uses(one, architectures, "auto", verdicts)
    engines = sum(use.cold for stage in uses.values() for use in stage)
    rows = (row_bytes(use.architecture, serving_of(one)) for stage in uses.values() for use in stage)
    ranks = (
        number
        for number in range(1, MOST_RANKS + 1)
        if not any(problem for stage in recipe.stages for problem in feasibility.over_ranks(stage, number))
    )
    # a recipe of CPU cores shares them out by itself
    return Needs(
        engines + scalars_of(recipe),
        max(rows, default=0) / GIB,
        tuple(ranks) if recipe.resources.device == "cuda" else (),
    )


def _transport(recipe: Recipe, cluster: Cluster, colocated: bool) -> Transport:
    """GPU to GPU where that is possible: two processes on one GPU can share memory and not be in one NCCL group."""
    r = recipe.resources
    if r.transport != "auto":
        return r.transport
    if r.device == "cuda" and (not colocated or r.trainer_ranks == cluster.gpus):
        return "ipc" if colocated else "nccl"
    return "shm" if len(cluster.nodes) == 1 else "cpu"


def check(recipe: Recipe) -> dict[str, Architecture]:
    """Raise PlanError for what no machine can run; stage name → the architecture of the model it leaves."""
    _refuse(feasibility.problems(recipe))
    architectures = _architectures(recipe)
    _refuse(unfit_stages(recipe, architectures))
    return architectures


def _refuse(*problems: Iterable[str], error: type[PlanError] = PlanError) -> None:
    if found := [problem for checks in problems for problem in checks]:
        raise error("\n".join(found))


def _architectures(recipe: Recipe) -> dict[str, Architecture]:
    """Stage name → the architecture of the model it leaves (of the model it uses, where it makes none)."""
    try:
        first = architecture_of(recipe.model)
    except ValueError as error:
        raise PlanError(str(error)) from error
    found: dict[str, Architecture] = {}
    for stage in recipe.stages:
        parent = recipe.parent_of(stage)
        current = found[parent] if parent else first
        if isinstance(stage, Sft) and stage.upcycle is not None:
            try:
                upcycle = stage.upcycle
                current = current.upcycled(upcycle.num_experts, upcycle.top_k, upcycle.layers)
            except ValueError as error:
                raise PlanError(f"stage {stage.name!r}: upcycle: {error}") from error
        if isinstance(stage, Rebuild):
            try:
                current = current.rebuilt(stage.bridge)
            except ValueError as error:
                raise PlanError(f"stage {stage.name!r}: {error}") from error
        if isinstance(stage, Merge):
            for name in stage.of:
                if found[name] != current:
                    raise PlanError(
                        f"stage {stage.name!r}: {name!r} and {parent!r} leave models of other shapes, which have no "
                        "average; merge stages that began from one model"
                    )
        found[stage.name] = current
    return found


def last_architecture(recipe: Recipe) -> Architecture:
    """The architecture of the model that the last stage leaves. Raises PlanError where one does not fit."""
    return _architectures(recipe)[recipe.stages[-1].name]


def _stage(recipe: Recipe, stage: Stage, architecture: Architecture, engines: tuple[EngineUse, ...]) -> StagePlan:
    r, longest = recipe.resources, recipe.resources.max_model_len
    steps = rows = rollouts_per_step = rollouts = 0
    if isinstance(stage, Sft):
        steps, rows = stage.steps, stage.batch_size
    elif isinstance(stage, Pairs):
        steps, rows = stage.steps, 2 * stage.batch_size
    elif isinstance(stage, Rl):
        rollouts_per_step = stage.prompts_per_step * stage.group_size
        if stage.learn:
            steps, rows = stage.steps * stage.updates_per_step, rollouts_per_step // stage.updates_per_step
        rollouts = stage.steps * rollouts_per_step if stage.replay is None else 0
    elif isinstance(stage, Synthesize):
        rollouts = stage.prompts * stage.samples
    return StagePlan(
        name=stage.name,
        kind=stage.kind,
        start=recipe.parent_of(stage),
        architecture=architecture,
        algorithm=algorithm_of(stage, architecture) if isinstance(stage, Rl) else None,
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
    rows = 0 if stage.eval_data is None else _rows(recipe, stage.eval_data)
    if stage.evaluate == "judge":
        return rows  # greedy, once
    if stage.evaluate != "modes":
        return 0
    both = 2 * asked.prompts * (asked.samples + 1)  # sampled and greedy, with and without thinking
    more = len(stage.temperatures) if isinstance(stage, Evaluate) else 0
    return both + more * asked.prompts * (asked.samples + 1) + min(rows, asked.prompts)


def _rows(recipe: Recipe, name: str) -> int:
    """Rows of a source or of a synthesize stage, at most; 0 for a file, which a plan does not open."""
    if name in recipe.data:
        return recipe.data[name].rows if recipe.data[name].builder is not None else 0
    return next(stage.most_rows for stage in recipe.stages if isinstance(stage, Synthesize) and stage.name == name)


def _notes(recipe: Recipe, stages: Sequence[StagePlan], nodes: Sequence[NodePlan]) -> Iterator[str]:
    if any(found.gpus and found.node.gpu_memory_gib is None for found in nodes):
        yield "whether GPUs have the memory was not checked: gpu_memory_gib of their nodes is not known"
    for stage, planned in zip(recipe.stages, stages, strict=True):
        for name in stage.judges:
            judge = recipe.judge(name)
            if judge.endpoint is not None:
                most = planned.rollouts if judge.budget is None else min(planned.rollouts, judge.budget)
                told = f"{judge.model} at {judge.endpoint}"
                yield f"stage {stage.name!r}: judge {name!r} asks {told} about up to {most} rollouts"
    unknown = next((stage.architecture for stage in stages if stage.architecture.parameters is None), None)
    if unknown is not None:
        yield f"{unknown.name}: its size is not known before it is downloaded; the memory estimate leaves it out"
    if any(use.verdict == "unproven" for stage in stages for use in stage.engines):
        yield "log-probs are unproven until `rlhf check` has measured them; a run proves every weight sync all the same"
