"""The table of studies: verdicts by hand, and stages and metrics that the recipe really has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf.data import probing
from rlhf.recipe import Optimised, Sft, load
from tests.studies import PICTURES, RECIPE, STUDIES, Found, Study, compute, find, gates, seconds, table


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
        asked = set()
        for arm in study.arms:
            name, measure = study.of_arm(arm)
            if measure == "flops":
                assert name in PICTURES
                continue
            stage = stages[name]
            assert isinstance(stage, Optimised)
            assert stage.evaluate == "loss"
            assert stage.eval_data is not None
            source = recipe.data[stage.eval_data]
            asked.add(source.like or stage.eval_data)
            assert (source.split, source.rows) == ("heldout", recipe.evaluation.prompts)
            if measure.startswith("eval.exact."):
                build = "rlhf.data.probing:build"
                assert source.builder == build
                rows = probing.build(str(source.table), 20, "heldout", 0, source.options)
                assert measure.removeprefix("eval.exact.") in {row["category"] for row in rows}
            elif measure.startswith("gate"):
                assert stage.start == "flamingo" or stages[str(stage.start)].start == "flamingo"
            else:
                assert measure in {"eval.exact", "model.trainable", "seconds"}
        # one set of questions, or one in two wordings
        assert len(asked) <= 1 or study.measure == "gate"


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
        arms = [study.of_arm(arm) for arm in study.arms]
        assert len({learned(name) for name, measure in arms if measure not in {"gate", "flops"}}) <= 1, study


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


def test_gates_are_read_from_weights(tmp_path: Path) -> None:
    name = "model.language_model.layers.{}.gated.{}_gate"
    weights = {name.format(0, "attn"): [-0.5], name.format(1, "attn"): [2.0], name.format(1, "ffw"): [9.0]}
    save_file({key: torch.tensor(value) for key, value in weights.items()}, tmp_path / "model.safetensors")
    found = gates(tmp_path)
    assert found == pytest.approx({"gate.0": 0.46212, "gate.1": 0.96403, "gate": 0.71307}, abs=1e-5)
    assert gates(tmp_path / "none") == {}


def test_operations_are_those_of_the_matrices() -> None:
    """The decoder's own: a token's are twice its weights, and attention's beside them."""
    width, inner, layers, heads, vision = 5120, 13824, 40, 40 * 128, 1024
    few, more = compute("llava15", 336, 336, text=1), compute("llava15", 336, 336, text=65)
    weights = layers * (4 * width * heads + 3 * width * inner)
    pairs = (576 + 65) ** 2 - (576 + 1) ** 2
    assert more - few == pytest.approx((64 * 2 * weights + layers * 4 * heads * pairs) / 1e12, rel=1e-6)
    # the encoder's 24 layers of 577 patches, its convolution, the connector; the last layer is not run
    seen = 577 * 2 * 12 * vision**2 + 4 * vision * 577**2
    around = 576 * 2 * 3 * 14**2 * vision + 576 * 2 * (vision * width + width**2)
    rest = few - (577 * 2 * weights + layers * 4 * heads * 577**2) / 1e12
    assert rest == pytest.approx((23 * seen + around) / 1e12, rel=1e-3)
