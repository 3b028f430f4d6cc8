"""What a stage is made from, as digests: a curriculum that is run again keeps what would come out the same.

`made` tells the digest of what an earlier stage left, `rows` the rows of a source or of an earlier stage, by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any

from rewards.base import file_of, sources_of
from rewards.templates import template_of
from rlhf.checkpoint import digest
from rlhf.data.rows import Rows
from rlhf.models import bridges_of, local_folder, marks_of
from rlhf.recipe import Merge, Optimised, Part, Rebuild, Recipe, Rl, Stage, Synthesize

Made = Callable[[str], str]
Found = Callable[[str], Rows]


def inputs_of(stage: Stage, recipe: Recipe, made: Made, rows: Found) -> dict[str, Any]:
    """Everything that determines a stage's artifact, and apart from that, what it is measured with, as digests: a
    change in the former makes the stage run again, in the latter makes it measured again."""
    parent = recipe.parent_of(stage)
    config = stage.model_dump(mode="json", exclude={"gates", "budget_minutes", "checkpoint_every"})
    measure = [config.pop(name, None) for name in ("evaluate", "eval_data", "temperatures")]
    decided: dict[str, Any] = {
        "stage": config,
        "shared": _shared(recipe) | {"precision": recipe.resources.precision},
        "judges": {name: deciding(name, recipe, made) for name in stage.judges},
        "code": _code(functions_of(stage)),
    }
    if isinstance(stage, Rebuild) and stage.parts:
        decided["parts"] = [_part(part, made) for part in stage.parts.values()]
    if isinstance(stage, Merge):  # rows decide whether it may be
        decided["parts"] = [*map(made, stage.of), recipe.evaluation.prompts]
    if stage.scalars:
        decided["scalars"] = {name: made(name) for name in stage.scalars}
    if isinstance(stage, Rl) and stage.replay:
        decided["record"] = digest(Path(stage.replay))
    return {
        "parent": made(parent) if parent else model_digest(recipe, rows),
        "recipe_digest": _digest(decided),
        "data_digest": _digest({name: rows(name).digest for name in trained_on(stage)}),
        "evaluation_digest": _digest(
            [_measure(stage, recipe, measure), {name: rows(name).digest for name in measured_on(stage, recipe)}]
        ),
    }


def _measure(stage: Stage, recipe: Recipe, said: list[Any]) -> list[Any]:
    """What a stage is measured with, given what the stage itself says of that."""
    if stage.evaluate == "none":
        return ["none"]
    asked = recipe.evaluation
    if stage.evaluate == "judge":
        settings = recipe.measured(stage).model_dump(mode="json", exclude={"artifact", "template", "image"})
    else:
        settings = asked.model_dump(mode="json")
    return [*said, settings, _code([asked.answer, asked.format, asked.soundness])]


def _part(part: Part, made: Made) -> Any:
    """Of a bridge that is rebuilt: what an earlier stage left, or the files of a folder."""
    if part.artifact is not None:
        return made(part.artifact)
    assert part.path is not None
    return facts_of(local_folder(part.path))


def deciding(name: str, recipe: Recipe, made: Made, also_spared: Set[str] = frozenset()) -> list[Any]:
    """What decides a judge's verdicts."""
    table = recipe.judge(name)
    if name not in recipe.judges:
        return [made(name), recipe.judging.model_dump(mode="json")]
    model = made(table.artifact) if table.artifact is not None else None
    spared = {"artifact", "key_env", "cache", "concurrency", "retries", "deadline", *also_spared}
    template, precision = template_of(table.template), recipe.resources.precision
    return [model, table.model_dump(mode="json", exclude=spared), template.text, template.image, precision]


def model_digest(recipe: Recipe, rows: Found) -> str:
    """What the model before all stages is: what it is built from, or which files it has."""
    if recipe.model.path is not None:
        return _digest([recipe.model.path, facts_of(local_folder(recipe.model.path))])
    data = {name: rows(name).digest for name in recipe.data}
    taken = recipe.model.tokenizer.path
    marks = sorted({mark for bridge in bridges_of(recipe) for mark in marks_of(bridge)})
    return _digest([_shared(recipe), data, marks, facts_of(local_folder(taken)) if taken else None])


def _shared(recipe: Recipe) -> dict[str, Any]:
    """What every artifact depends on; which engine serves a model changes nothing in it."""
    return recipe.model_dump(
        mode="json", include={"seed": True, "chat": True, "model": {"bridge", "path", "tokenizer"}}
    )


def facts_of(folder: Path) -> list[tuple[str, int, int]]:
    """What tells whether a folder's files have changed: the bytes of a large model would take minutes to read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def trained_on(stage: Stage) -> list[str]:
    """Names of the rows a stage makes its artifact from."""
    if isinstance(stage, Merge):
        return [stage.on]
    return [*getattr(stage, "data", {}), *(stage.calibrating if isinstance(stage, Optimised) else ())]


def measured_on(stage: Stage, recipe: Recipe) -> list[str]:
    """Names of the rows a stage is measured on."""
    names = [recipe.evaluation.data] if stage.evaluate == "modes" and recipe.evaluation.data is not None else []
    return names + ([stage.eval_data] if stage.eval_data is not None else [])


def functions_of(stage: Stage) -> list[str | None]:
    """The functions that decide what a stage makes, those among the options of others too."""
    if isinstance(stage, Rl):
        options = [value for part in stage.rewards.values() for value in part.options.values()]
        named = [value for value in options if isinstance(value, str) and re.fullmatch(r"[\w./-]+:\w+", value)]
        return [*(part.function for part in stage.rewards.values()), *named]
    return [stage.answer, stage.critic] if isinstance(stage, Synthesize) else []


def _code(functions: Iterable[str | None]) -> dict[str, str]:
    """sha256 of the files each function is written in: a reward that was edited is another reward."""
    files = {name: file_of(name) for name in functions if name is not None}
    return {
        name: hashlib.sha256(b"\0".join(one.read_bytes() for one in sources_of(path))).hexdigest()
        for name, path in files.items()
        if path is not None and path.is_file()
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
