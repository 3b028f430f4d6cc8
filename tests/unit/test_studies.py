"""The table of studies: verdicts by hand, and stages and metrics that the recipe really has."""

from __future__ import annotations

import pytest

from rlhf.recipe import Optimised, load
from tests.studies import RECIPE, STUDIES, Found, Study, find, table


def found(one: tuple[float, ...], other: tuple[float, ...], **settings: object) -> Found:
    return Found(Study("A paper", "which?", "one", ("one", "other"), **settings), {"one": one, "other": other})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other", "settings", "verdict"),
    [
        ((0.6, 0.7, 0.8), (0.5, 0.6, 0.7), {}, "agrees"),
        ((0.6, 0.7, 0.6), (0.5, 0.6, 0.7), {}, "open"),
        ((0.4, 0.5, 0.6), (0.5, 0.6, 0.7), {}, "disagrees"),
        ((0.5, 0.5), (0.5, 0.5), {}, "disagrees"),  # reported to differ
        ((0.49, 0.5), (0.5, 0.5), {"slack": 0.02}, "agrees"),
        ((10.0, 11.0), (20.0, 21.0), {"lower": True}, "agrees"),
    ],
)
def test_verdicts(one: tuple[float, ...], other: tuple[float, ...], settings: dict[str, object], verdict: str) -> None:
    assert found(one, other, **settings).verdict == verdict


def test_every_arm_is_a_stage_that_measures_it() -> None:
    stages = {stage.name: stage for stage in load([RECIPE]).stages}
    for study in STUDIES:
        measured = {stages[arm].eval_data for arm in study.arms}
        if "unasked" not in "".join(study.arms):  # whose questions differ, which is the study
            assert len(measured) == 1, study
        for arm in study.arms:
            stage = stages[arm]
            assert isinstance(stage, Optimised)
            assert stage.evaluate == "loss"


def test_arms_differ_in_no_step_but_where_steps_are_the_question() -> None:
    recipe = load([RECIPE])
    stages = {stage.name: stage for stage in recipe.stages}

    def learned(name: str | None) -> int:
        """Rows that a model has learned from, from the base on."""
        if name in (None, "vision"):
            return 0
        stage = stages[name]
        return learned(stage.start) + (stage.steps * stage.batch_size if isinstance(stage, Optimised) else 0)  # type: ignore[attr-defined]

    for study in STUDIES:
        assert len({learned(arm) for arm in study.arms}) == 1, study


def test_a_line_of_the_table() -> None:
    study = Study("A paper", "which?", "one", ("one", "other"), "eval.exact.short")
    runs = [
        {
            "stages": [
                {"name": "one", "seconds": 3.0, "metrics": {"eval.exact.short": 0.5 + seed / 10}},
                {"name": "other", "seconds": 3.0, "metrics": {"eval.exact.short": 0.4}},
            ]
        }
        for seed in range(3)
    ]
    line = table([find(study, runs)]).splitlines()[-1]
    assert line == (
        "| A paper | which? | right answers (short) | one | one 0.600 ± 0.100<br>other 0.400 ± 0.000 | agrees |"
    )
