"""AdaLRS: how fast a loss falls, and what follows for the learning rate."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rlhf.recipe import Search
from rlhf.search import RateSearch, Verdict, factors, velocity


def test_the_velocity_is_that_of_a_fitted_line() -> None:
    rng = np.random.default_rng(0)
    losses = 2.0 - 0.03 * np.arange(30) + rng.normal(0, 0.1, 30)
    (slope, _), covariance = np.polyfit(np.arange(30), losses, 1, cov=True)
    found = velocity(losses.tolist())
    assert found.value == pytest.approx(-slope, rel=1e-9)
    assert found.error == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-9)


def test_three_steps_up_and_down_are_the_rate_that_sail_vl2_reports() -> None:
    settings = Search(window=3, decay=1.0)
    rate = 2e-4
    for trial in range(3):
        up, down = factors(settings, trial)
        rate *= up / down
    assert rate == pytest.approx(6.75e-4, rel=1e-12)


def test_factors_come_closer_to_one_and_stop_there() -> None:
    settings = Search(window=3, up=1.5, down=1.43, decay=0.9)
    assert factors(settings, 2) == pytest.approx((1.215, 1.1583))
    assert factors(settings, 20) == (1.0, 1.0)


def descend(search: RateSearch, rate: float, noise: float) -> float:
    """The loss at the end of gradient descent on 20 directions of unequal curvature, taken back as the search wants."""
    chance, curvature = random.Random(0), np.geomspace(0.01, 1.0, 20)
    weights = saved = np.ones(20)
    step = kept = 0
    while step < search.steps:
        weights = weights - rate * search.scale * curvature * weights
        step += 1
        match search.saw(step, float(curvature @ weights**2) + chance.gauss(0, noise)):
            case Verdict.TRY:
                saved, kept = weights, step
            case Verdict.GO_BACK:
                weights, step = saved, kept
            case Verdict.GO_ON | Verdict.UNDECIDED:
                pass
    return float(curvature @ weights**2)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_rate_far_too_low_rises_and_the_loss_ends_lower(noise: float) -> None:
    found, fixed = RateSearch(Search(window=15), 400), RateSearch(None, 400)
    assert descend(found, 2e-3, noise) < 0.5 * descend(fixed, 2e-3, noise)
    assert 10 < found.scale < 1000
    assert fixed.scale == 1.0


def test_nothing_is_tried_outside_the_span() -> None:
    search = RateSearch(Search(window=3, span=(0.5, 0.7)), 100)
    seen = {step: search.saw(step, -float(step)) for step in range(1, 101)}
    tried = [step for step, verdict in seen.items() if verdict is not Verdict.GO_ON]
    assert min(tried) >= 53
    assert max(tried) <= 70
    assert search.before is None


def test_without_a_clear_difference_the_steps_stay_and_the_rate_is_as_before() -> None:
    search = RateSearch(Search(window=4, span=(0.0, 1.0)), 8)
    losses = [3.0, 2.0, 2.5, 1.0, 0.9, 0.2, 0.5, -0.6]
    verdicts = [search.saw(step, loss) for step, loss in enumerate(losses, 1)]
    assert verdicts[3] is Verdict.TRY
    assert verdicts[4:] == [Verdict.UNDECIDED] * 3 + [Verdict.GO_ON]
    assert search.scale == 1.0
    assert search.trials == 1
