"""The table of studies: verdicts by hand, and stages and metrics that the recipe really has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.data import probing
from rlhf.recipe import Optimised, Sft, load
from tests.studies import RECIPE, STUDIES, Found, Study, find, seconds, table


def found(one: tuple[float, ...], other: tuple[float, ...], **settings: object) -> Found:
    return Found(Study("A paper", "which?", "one", ("one", "other"), **settings), {"one": one, "other": other})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other", "settings", "verdict"),
    [
        ((0.6, 0.7, 0.8), (0.5, 0.6, 0.7), {}, "agrees"),
        ((0.6, 0.7, 0.6), (0.5, 0.6, 0.7), {}, "open"),
        ((0.4, 0.5, 0.6), (0.5, 0.6, 0.7), {}, "disagrees"),
        ((0.505, 0.505), (0.5, 0.5), {}, "open"),  # no more than chance
        ((0.495, 0.5), (0.5, 0.5), {"keeps": 0.98}, "agrees"),
        ((0.48, 0.5), (0.5, 0.5), {"keeps": 0.98}, "open"),
        ((0.48, 0.48), (0.5, 0.5), {"keeps": 0.98}, "disagrees"),
        ((10.0, 11.0), (20.0, 21.0), {"lower": True}, "agrees"),
    ],
)
def test_verdicts(one: tuple[float, ...], other: tuple[float, ...], settings: dict[str, object], verdict: str) -> None:
    assert found(one, other, **settings).verdict == verdict


def test_every_arm_is_a_stage_that_measures_it() -> None:
    recipe = load([RECIPE])
    stages = {stage.name: stage for stage in recipe.stages}
    for study in STUDIES:
        assert study.of
        for arm in study.arms:
            stage = stages[arm]
            assert isinstance(stage, Optimised)
            assert stage.evaluate == "loss"
            assert stage.eval_data is not None
            source = recipe.data[stage.eval_data]
            assert (source.split, source.rows) == ("heldout", recipe.evaluation.prompts)
            kind = study.measure.removeprefix("eval.exact.")
            if study.measure.startswith("eval.exact."):
                build = "rlhf.data.probing:build"
                assert source.builder == build
                assert kind in {row["category"] for row in probing.build(str(source.table), 20, "heldout", 0, {})}
            else:
                assert study.measure in {"eval.exact", "model.trainable", "seconds"}
        # one set of questions, or one in two wordings
        assert len({recipe.data[str(stages[arm].eval_data)].like or stages[arm].eval_data for arm in study.arms}) == 1


def test_arms_learn_from_as_many_rows_of_the_same_base() -> None:
    recipe = load([RECIPE])
    stages = {stage.name: stage for stage in recipe.stages}

    def learned(name: str) -> int:
        if name == "vision":
            return 0
        stage, parent = stages[name], recipe.parent_of(stages[name])
        assert parent is not None
        return learned(parent) + (stage.steps * stage.batch_size if isinstance(stage, Sft) else 0)

    for study in STUDIES:
        assert len({learned(arm) for arm in study.arms}) == 1, study


def test_a_line_of_the_table() -> None:
    study = Study("A paper", "which?", "one", ("one", "other"), "eval.exact.short")
    runs = [{"one": {"eval.exact.short": 0.5 + seed / 10}, "other": {"eval.exact.short": 0.4}} for seed in range(3)]
    line = table([find(study, runs)]).splitlines()[-1]
    assert line == (
        "| A paper | which? | right answers (short) | one "
        "| one 0.600 (0.500 to 0.700)<br>other 0.400 (0.400 to 0.400) | agrees |"
    )


def test_a_step_made_twice_counts_once(tmp_path: Path) -> None:
    steps = [(1, 2.0), (2, 3.0), (2, 1.0)]
    lines = [json.dumps({"step": step, "seconds": {"data": 9.0, "train": train}}) for step, train in steps]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines))
    assert seconds(tmp_path / "steps.jsonl") == 3.0
    assert seconds(tmp_path / "none.jsonl") == 0.0
