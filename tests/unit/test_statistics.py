"""Sums over the steps of a stage, and over the updates of a step."""

from __future__ import annotations

import pytest

from rlhf.statistics import merged
from rlhf.types import StepStats


def test_updates_of_a_step_become_one() -> None:
    long = StepStats({"tokens": 300.0, "clip_fraction": 0.1, "loss": 1.0, "lr": 2.0, "ratio_max": 3.0}, [1e-6], [False])
    short = StepStats({"tokens": 100.0, "clip_fraction": 0.5, "loss": 3.0, "lr": 1.0, "ratio_max": 2.0, "late": 7.0})
    found = merged([long, short])
    assert found.metrics == pytest.approx(
        {"tokens": 400.0, "clip_fraction": 0.2, "loss": 2.0, "lr": 1.0, "ratio_max": 3.0, "late": 7.0}
    )
    assert (found.gap, found.tied) == ([1e-6], [False])
