"""What `rlhf bridges` lists: published bridges, what they weigh, what a picture becomes, what trains in each stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.architecture import Architecture, geometry_of
from rlhf.plan.derive import last_architecture
from rlhf.plan.text import Text, aligned
from rlhf.plan.types import PlanError
from rlhf.recipe import Optimised, Rebuild, Recipe, Sft, Stage, load

COLUMNS = ("recipe", "parameters", "tokens", "rollouts", "stages: what trains")
SERVED = {
    "nothing": "vLLM",
    "pictures": "vLLM, the picture's number beside positions",
    "modality": "vLLM, with or without pictures beside positions",
    "asked": "transformers, an encoder and a decoder",
}


def list_bridges(paths: Sequence[Path], size: tuple[int, int], markdown: bool = False) -> str:
    """A table of recipes, a line for each stage. Sizes are those after the last stage; tokens are those of a picture of
    `size` = (width, height), and the most any picture becomes. Raises PlanError where a recipe builds no bridge."""
    rows = [_row(path, load([path]), size) for path in paths]
    if not markdown:
        lines = [
            (*(cells if not place else [""] * len(cells)), stage)
            for *cells, stages in rows
            for place, stage in enumerate(stages)
        ]
        return "\n".join(aligned(Text("", COLUMNS, tuple(lines))))
    lines = [COLUMNS, ("---", "--:", "--:", "---", "---"), *((*cells, "<br>".join(stages)) for *cells, stages in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(path: Path, recipe: Recipe, size: tuple[int, int]) -> tuple[str, str, str, str, list[str]]:
    try:
        architecture = last_architecture(recipe)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    if not architecture.is_bridge:
        raise PlanError(f"{path}: [model] is no bridge to build; name recipes such as recipes/bridges/llava15.toml")
    geometry = geometry_of(architecture.tables)
    tokens, most = len(geometry.pattern(geometry.layout(*size))), geometry.most_tokens
    return (
        recipe.name,
        _billions(architecture),
        f"{tokens:,}" if tokens == most else f"{tokens:,} of {most:,}",
        SERVED[geometry.told] + (", with the question" if geometry.connector.text_length else ""),
        [_stage(stage) for stage in recipe.stages],
    )


def _billions(architecture: Architecture) -> str:
    found = architecture.parameters
    return "?" if found is None else f"{found / 1e9:.2f} B" if found >= 1e8 else f"{found / 1e6:.1f} M"


def _stage(stage: Stage) -> str:
    if isinstance(stage, Rebuild):
        given = [(slot, key, value) for slot, table in stage.bridge.items() for key, value in table.items()]
        changed = [f"no {slot}" if key == "remove" else f"{slot}.{key} = {value}" for slot, key, value in given]
        return f"{stage.name}: {', '.join([*changed, *(f'{slot} taken over' for slot in stage.parts)])}"
    if not isinstance(stage, Optimised):
        return f"{stage.name}: {stage.kind}"
    globs = ["everything"] if stage.train is None else [glob.removesuffix(".*") for glob in stage.train]
    if stage.lora is not None:
        beside = [glob.removesuffix(".*") for glob in stage.lora.whole]
        globs = [f"adapters of rank {stage.lora.rank}", *beside]
    if isinstance(stage, Sft) and stage.upcycle is not None:
        globs.append(f"of {stage.upcycle.num_experts} experts")
    return f"{stage.name}: {', '.join(globs)}"
