"""A plan as `rlhf plan` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf.plan.types import Parts, Plan, StagePlan
from rlhf.recipe import Implementation


@dataclass(frozen=True)
class Text:
    """A table of words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


ENGINES: Mapping[Implementation, str] = {
    "auto": "vLLM",
    "vllm": "vLLM, its own implementation",
    "transformers": "vLLM, through its Transformers backend",
    "huggingface": "transformers itself, a forward of the whole row a token: slow",
}


def describe(plan: Plan) -> str:
    """All of it as plain text: totals, notes, and tables of actors, stages and engines."""
    budget = "none" if plan.budget_minutes is None else f"{plan.budget_minutes:g} minutes"
    shared = ", sharing GPUs with the trainer" if plan.colocated else ""
    lines = [
        f"{plan.recipe}: {len(plan.stages)} stages, budget {budget}",
        f"{plan.world_size} trainer rank(s); weights go to the engines by {plan.transport}{shared}; "
        f"engines: {ENGINES[plan.implementation]}; {plan.cold_starts} engine cold start(s)",
        f"memory: about {plan.memory.together:.1f} GiB of resources.memory_gib = {plan.memory_limit_gib:g} "
        f"({plan.cluster})",
    ]
    if plan.on_gpus:
        lines += list(_on_gpus(plan))
    lines += [f"note: {note}" for note in plan.notes]
    for table in _tables(plan):
        lines += ["", table.title, *aligned(table)]
    return "\n".join(lines)


def _tables(plan: Plan) -> tuple[Text, ...]:
    actors = tuple(
        (
            *(a.role, str(a.count), f"{a.cpus:g}", str(a.threads), f"{a.gpus:g}", f"{a.memory_gib:.2f}"),
            *([f"{a.gpu_memory_gib:.1f}" if a.gpus else ""] if plan.on_gpus else []),
        )
        for a in plan.actors
    )
    stages = tuple(_stage_row(stage) for stage in plan.stages)
    engines = tuple(
        (stage.name, use.role, use.architecture.name, str(use.workers), str(use.cold), use.verdict)
        for stage in plan.stages
        for use in stage.engines
    )
    return (
        Text(
            "Actors",
            ("role", "number", "cpus", "threads", "gpus", "GiB each", *(["GiB of a GPU"] if plan.on_gpus else [])),
            actors,
        ),
        *_nodes(plan),
        Text(
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
                "budget_minutes",
            ),
            stages,
        ),
        Text("Engines", ("stage", "role", "architecture", "workers", "cold starts", "log-probs"), engines),
    )


def _nodes(plan: Plan) -> Iterator[Text]:
    """What stands where, nodes that are alike in one row; nothing for a single one without GPUs."""
    if len(plan.cluster.nodes) == 1 and not plan.on_gpus:
        return
    rows = []
    for found, number in Counter(plan.nodes).items():
        needed = Counter(f"{gib:.1f}" for gib in found.gpus)
        limit = "?" if found.node.gpu_memory_gib is None else f"{found.node.gpu_memory_gib:g}"
        gpus = ", ".join(f"{count} × {gib}" if count > 1 else gib for gib, count in needed.items())
        rows.append(
            (
                str(number),
                ", ".join(f"{count} {role}" for role, count in found.processes),
                f"{found.memory_gib:.1f} of {found.node.memory_gib:g}",
                f"{gpus} of {limit}" if gpus else "",
                f"{len(found.gpus)} of {found.node.gpus}",
            )
        )
    if idle := len(plan.cluster.nodes) - len(plan.nodes):
        rows.append((str(idle), "nothing", "", "", ""))
    columns = ("nodes", "processes", "host GiB", "GiB of each GPU", "GPUs in use")
    yield Text("Nodes, each", columns, tuple(rows))


def _on_gpus(plan: Plan) -> Iterator[str]:
    """What takes a GPU's memory, and how far an engine's cache goes."""
    yield f"on the GPU of a trainer rank: {_parts(plan.memory.trainer_parts)}"
    if plan.memory.engine_parts:
        rows = "" if plan.longest_rows is None else f"; its cache holds {plan.longest_rows:,} longest rows at once"
        yield f"on a GPU of an engine: {_parts(plan.memory.engine_parts)}{rows}"


def _parts(parts: Parts) -> str:
    told = ", ".join(f"{name} {size:.1f}" for name, size in parts if size >= 0.05)
    return f"{sum(size for _, size in parts):.1f} GiB ({told})"


def _stage_row(stage: StagePlan) -> tuple[str, ...]:
    parameters = stage.architecture.parameters
    rollouts = stage.rollouts + stage.evaluation_rollouts
    return (
        stage.name,
        stage.kind + (f" ({stage.algorithm})" if stage.algorithm else ""),
        stage.start or "[model]",
        "?" if parameters is None else f"{parameters:,}" + _active(stage),
        f"{stage.optimizer_steps:,}" if stage.optimizer_steps else "",
        f"{stage.rows_per_update:,}" if stage.rows_per_update else "",
        str(stage.micro_batches) if stage.micro_batches else "",
        f"{rollouts:,}" if rollouts else "",
        "" if stage.budget_minutes is None else f"{stage.budget_minutes:g}",
    )


def _active(stage: StagePlan) -> str:
    """Of a mixture of experts, what a token meets."""
    found = stage.architecture.active_parameters
    return "" if stage.architecture.experts is None or found is None else f" ({found:,} active)"


def aligned(table: Text) -> Iterator[str]:
    """Its lines, columns under one another."""
    lines = (table.columns, *table.rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
