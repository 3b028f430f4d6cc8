"""`rlhf check`: which vLLM implementation serves [model], and how far its log-probs are from the trainer's.

Every implementation is started once on the model's folder, which the trainer opens too, and both are compared on the
probes; that weights arrive is proven by every publish of a run. The verdict is kept by architecture and versions;
`rlhf plan` quotes it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from actors.handles import reason
from actors.launch import Cast, launch
from rlhf.curriculum import Curriculum
from rlhf.plan import VERDICTS, Verdict, implementations, installed_versions, make_plan, read_verdicts
from rlhf.recipe import Evaluate, Recipe, RecipeError, Sft
from rlhf.roles import SyncError
from rlhf.tasks import under_way


async def check(recipe: Recipe, folder: Path) -> list[Verdict]:
    """Measure every implementation that `model.implementation` allows, and keep the verdicts in `folder`'s parent.

    What it builds for that goes to `folder`/check: a run builds its own."""
    if not recipe.data:
        raise RecipeError("[data] is empty: a check needs rows, of which it takes pictures; give one source")
    recipe = _narrowed(recipe)
    architecture = make_plan(recipe).stages[0].architecture
    (stage,) = recipe.stages
    assert isinstance(stage, Sft)
    found = []
    async with launch(recipe, make_plan(_serving(recipe))) as actors:
        curriculum = Curriculum(recipe, folder / "check")
        curriculum.actors = actors
        curriculum.prepare()
        async with under_way(curriculum.begin(stage)) as begun:
            for implementation in implementations(recipe.model.implementation, architecture):
                actors.placement.implementation = implementation
                gap, proven = await _measure(actors, curriculum.model_before(stage), begun)
                actors.dismiss()
                found.append(Verdict(architecture.digest, implementation, gap, proven, installed_versions()))
                keep(folder.parent / VERDICTS, found[-1:])  # each as it comes: the next may end the process
    return found


def keep(path: Path, found: Sequence[Verdict]) -> None:
    """Add verdicts to a file, replacing those of the same architecture and implementation."""
    new = {(verdict.architecture, verdict.implementation) for verdict in found}
    kept = [verdict for verdict in read_verdicts(path) if (verdict.architecture, verdict.implementation) not in new]
    rows = [{**asdict(verdict), "versions": dict(verdict.versions)} for verdict in (*kept, *found)]
    path.write_text(json.dumps(rows, indent=1))


def _narrowed(recipe: Recipe) -> Recipe:
    """The recipe with one stage that would train [model]."""
    source = recipe.evaluation.data if recipe.evaluation.data in recipe.data else next(iter(recipe.data))
    stage = Sft(name="measure", kind="sft", data={source: 1.0}, steps=1, batch_size=1, lr=1e-6)
    # it asks nothing and trains on nothing: rows that are held out elsewhere serve as well
    evaluation = recipe.evaluation.model_copy(update={"data": None})
    return recipe.model_copy(update={"stages": [stage], "evaluation": evaluation})


def _serving(recipe: Recipe) -> Recipe:
    """The narrowed recipe with a stage that asks something: a plan with an engine in it."""
    (stage,) = recipe.stages
    assert isinstance(stage, Sft)
    asks = Evaluate(name="serve", kind="evaluate", evaluate="judge", eval_data=next(iter(stage.data)))
    return recipe.model_copy(update={"stages": [stage, asks]})


async def _measure(actors: Cast, model: Path, begun: asyncio.Task[Any]) -> tuple[float, bool]:
    """(largest log-prob gap, whether it is proven), once the trainer has begun; infinite for an implementation that
    cannot serve the model."""
    implementation = actors.placement.implementation
    try:
        async with actors.serving({"policy": model}) as engines:
            await begun
            agreement = await actors.trainer.agree(engines["policy"])
    except SyncError as error:
        print(f"{implementation}: {error}")
        return math.inf, False
    except (RayError, RuntimeError, TimeoutError) as error:
        if begun.done():
            begun.result()  # raises what the trainer failed with: that is no verdict on an engine
        print(f"{implementation}: cannot serve this model: {reason(error)}")
        return math.inf, False
    return agreement.max_gap, agreement.ok
