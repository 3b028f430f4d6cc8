"""Which engines a curriculum starts, and which of them each stage uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rlhf.architecture import Architecture
from rlhf.plan.types import EngineUse
from rlhf.plan.verdicts import Verdict, verdict_on
from rlhf.recipe import Implementation, Recipe, Rl, Stage, Synthesize


def engine_uses(
    recipe: Recipe,
    architectures: Mapping[str, Architecture],
    implementation: Implementation,
    verdicts: Sequence[Verdict],
) -> dict[str, tuple[EngineUse, ...]]:
    """Stage name → engines it uses. Engines outlive stages: one of the same architecture takes new weights, a role
    that finds none free starts its own."""
    live: list[Architecture] = []
    uses: dict[str, tuple[EngineUse, ...]] = {}
    for stage in recipe.stages:
        found: list[EngineUse] = []
        for needed in _serving(recipe, stage, architectures):
            busy: list[int] = []
            for role, architecture in needed:
                free = [i for i, running in enumerate(live) if running == architecture and i not in busy]
                workers = recipe.resources.rollout_workers if role == "policy" else 1
                if not free:
                    live.append(architecture)
                busy.append(free[0] if free else len(live) - 1)
                verdict = verdict_on(architecture, implementation, verdicts)
                found.append(EngineUse(role, architecture, workers, 0 if free else workers, verdict))
        uses[stage.name] = tuple(_merged(found))
    return uses


def is_served(stage: Stage) -> bool:
    """Whether a stage, or its evaluation, needs an engine."""
    return _samples(stage) or stage.evaluate in ("modes", "judge", "rank")


def _samples(stage: Stage) -> bool:
    return isinstance(stage, Synthesize) or (isinstance(stage, Rl) and stage.replay is None)


def _serving(
    recipe: Recipe, stage: Stage, architectures: Mapping[str, Architecture]
) -> Iterator[list[tuple[str, Architecture]]]:
    """The sets of (role, architecture) that must serve at once: during the stage, then in its evaluation."""
    if _samples(stage):
        policy = ("policy", architectures[stage.name])
        yield [policy, *((f"judge {name}", architectures[name]) for name in recipe.judge_models(stage))]
    if stage.evaluate in ("modes", "judge", "rank"):
        yield [("policy", architectures[stage.name])]


def _merged(uses: Sequence[EngineUse]) -> Iterator[EngineUse]:
    """One entry for each role: the evaluation after a stage reuses the stage's engine."""
    first = {use.role: use for use in reversed(uses)}
    yield from (first[role] for role in dict.fromkeys(use.role for use in uses))
