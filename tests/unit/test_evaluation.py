"""What is counted of verdicts, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rewards.judge import verdict
from rlhf.evaluation import agreement, apart, calibration, fitted
from rlhf.recipe import Judging
from rlhf.types import Fit, Prompt, Rollout, Score

YES, NO, UNPARSED = Score("scored", 1.0), Score("scored", 0.0), Score("failed", note="neither yes nor no")


def test_agreement_by_hand() -> None:
    """Ten rows, six sound: yes on five of these and on one of the four others."""
    said = [YES] * 5 + [NO] + [YES] + [NO] * 3
    found = agreement(said, [True] * 6 + [False] * 4, "judge")
    assert found["judge.precision"] == pytest.approx(5 / 6)
    assert found["judge.recall"] == pytest.approx(5 / 6)
    assert found["judge.accuracy"] == pytest.approx(0.8)
    # chance agrees on 0.6 · 0.6 + 0.4 · 0.4 = 0.52
    assert found["judge.kappa"] == pytest.approx((0.8 - 0.52) / 0.48)
    assert found["judge.failed"] == 0


def test_a_sound_row_without_a_verdict_is_not_found() -> None:
    found = agreement([YES, YES, UNPARSED, UNPARSED, NO], [True, True, True, True, False], "judge")
    assert found["judge.recall"] == 0.5
    assert found["judge.precision"] == 1.0
    assert found["judge.failed"] == pytest.approx(0.4)


def test_a_judge_that_never_answers_has_nothing() -> None:
    found = agreement([UNPARSED] * 2, [True, False], "judge")
    assert [found[f"judge.{name}"] for name in ("precision", "recall", "kappa", "failed")] == [0, 0, 0, 1]


def test_calibration_by_hand() -> None:
    """Sure at 0.95 and right twice of three, sure at 0.65 and right; and one that says neither."""

    def reply(text: str, probability: float) -> Rollout:
        return Rollout((1, 2), (0.0, math.log(probability)), (0, 0), text, "stop")

    replies = [reply("yes", 0.95), reply("no", 0.95), reply("yes", 0.95), reply("no", 0.65), reply("3 5", 0.1)]

    def found_in(replies: list[Rollout], truth: list[bool]) -> dict[str, float]:
        return calibration(replies, [verdict(one) for one in replies], truth, Judging())

    found = found_in(replies, [True, False, False, False, True])
    assert found == {
        "judge.calibration.0.6.accuracy": 1.0,
        "judge.calibration.0.6.share": 0.25,
        "judge.calibration.0.9.accuracy": pytest.approx(2 / 3),
        "judge.calibration.0.9.share": 0.75,
        "judge.calibration.error": pytest.approx(0.75 * (0.95 - 2 / 3) + 0.25 * 0.35),
    }
    assert found_in([reply("yes", 1.0)], [True])["judge.calibration.0.9.share"] == 1.0
    assert found_in([reply("3 5", 1.0)], [True]) == {}


def test_fit_by_hand() -> None:
    """A mean over tokens, shares over rows, of all and of each kind; a row without a kind counts among all."""
    found = {"a": Fit(3.0, 2, True), "b": Fit(1.0, 6, False), "c": Fit(0.0, 0, True)}
    assert fitted(found, {"a": "sum", "b": "sum", "c": ""}) == {
        "eval.loss": 0.5,
        "eval.tokens": 8,
        "eval.exact": pytest.approx(2 / 3),
        "eval.exact.sum": 0.5,
    }


def test_measures_apart_by_hand() -> None:
    """By any column of the rows; two samples a prompt."""
    kinds = ("easy", "hard", "easy")
    prompts = [Prompt(kind, "s", "?", (1,), (), True, {"complexity": kind, "category": "sum"}) for kind in kinds]
    measures = {"think_rate": np.array([[0, 1], [1, 1], [0, 0]]), "tokens": np.array([[2, 4], [9, 9], [2, 2]])}
    assert apart(prompts, "complexity", measures) == {
        "think_rate.easy": 0.25,
        "tokens.easy": 2.5,
        "think_rate.hard": 1.0,
        "tokens.hard": 9.0,
    }
    assert apart(prompts, "category", measures)["think_rate.sum"] == 0.5
