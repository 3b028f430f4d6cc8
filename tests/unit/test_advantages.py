"""Advantage estimators against loops and hand-worked cases."""

from __future__ import annotations

import math
import random

import pytest

from rlhf.algorithms.advantages import ESTIMATORS, credited, generalised
from rlhf.algorithms.shaping import overlong, punish_length
from rlhf.types import Group, Prompt, Rollout, Score

EPS = 1e-6


def mean(values) -> float:
    return sum(values) / len(values)


def std(values) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def known(scores) -> list[float]:
    return [score for score in scores if score is not None]


def slow(name: str, groups):
    everything = [score for group in groups for score in known(group)]
    centred = [score - mean(known(group)) for group in groups for score in known(group)]
    result = []
    for group in groups:
        row = []
        for i, score in enumerate(group):
            others = [s for j, s in enumerate(group) if j != i and s is not None]
            if score is None:
                row.append(0.0)
            elif name == "group_normalised":
                row.append((score - mean(known(group))) / (std(known(group)) + EPS))
            elif name == "group_centred":
                row.append(score - mean(known(group)))
            elif name == "leave_one_out":
                row.append(score - mean(others) if others else 0.0)
            elif name == "batch_normalised":
                row.append((score - mean(everything)) / (std(everything) + EPS))
            else:
                row.append((score - mean(known(group))) / (std(centred) + EPS))
        result.append(row)
    return result


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_equal_the_loop(name) -> None:
    pick = random.Random(3)
    for _ in range(50):
        groups = [[pick.choice([None, 0.0, 1.0, pick.random()]) for _ in range(pick.randint(3, 8))] for _ in range(5)]
        groups[0] = [0.5, 0.5, None]
        found = ESTIMATORS[name].estimate(groups)
        for row, expected in zip(found, slow(name, groups), strict=True):
            assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_scores_failures_and_nothing_give_zeros(name) -> None:
    estimate = ESTIMATORS[name].estimate
    assert estimate([[0.1, 0.1, 0.1]]) == [[0.0, 0.0, 0.0]]
    assert estimate([[None, None]]) == [[0.0, 0.0]]
    assert estimate([[3.0, None]]) == [[0.0, 0.0]]
    assert estimate([[], []]) == [[], []]


def test_advantages_by_hand() -> None:
    groups = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, None]]
    found = {name: estimator.estimate(groups) for name, estimator in ESTIMATORS.items()}
    assert found["group_normalised"][0] == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-5)
    assert found["group_centred"][0] == [0.5, -0.5, -0.5, 0.5]
    assert found["leave_one_out"][0] == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    # seven scores, five of them 1: mean 5/7, std sqrt(10/7 / 6)
    assert found["batch_normalised"][1] == pytest.approx([(2 / 7) / math.sqrt(10 / 42)] * 3 + [0.0], abs=1e-5)
    # four of ±0.5 and three of 0: std sqrt(1 / 6)
    assert found["baseline_batch_normalised"][0][0] == pytest.approx(0.5 / math.sqrt(1 / 6), abs=1e-5)
    for name, estimator in ESTIMATORS.items():
        assert any(found[name][1]) != estimator.within_groups


def test_an_unscored_rollout_is_left_out_and_not_a_zero() -> None:
    for estimator in ESTIMATORS.values():
        (with_gap,) = estimator.estimate([[1.0, None, 3.0, 2.0]])
        assert [with_gap[0], *with_gap[2:]] == estimator.estimate([[1.0, 3.0, 2.0]])[0]
        assert with_gap[1] == 0.0
        assert with_gap[0] != estimator.estimate([[1.0, 0.0, 3.0, 2.0]])[0][0]


def test_a_score_that_is_not_finite_is_refused() -> None:
    for estimator in ESTIMATORS.values():
        with pytest.raises(ValueError, match="rollout 1"):
            estimator.estimate([[0.0, math.nan]])


def test_generalised_advantages_equal_the_double_sum() -> None:
    pick = random.Random(0)
    for discount, smoothing in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)):
        rewards, values = ([pick.gauss(0, 1) for _ in range(6)] for _ in range(2))
        advantages, returns = generalised(rewards, values, discount, smoothing)
        for t in range(6):
            expected = 0.0
            for k in range(t, 6):
                following = values[k + 1] if k < 5 else 0.0
                expected += (discount * smoothing) ** (k - t) * (rewards[k] + discount * following - values[k])
            assert advantages[t] == pytest.approx(expected)
            assert returns[t] == pytest.approx(expected + values[t])


def test_generalised_advantages_by_hand() -> None:
    """A reward of 1 at the end, values ½: with smoothing 1 every advantage is what was not foreseen, 1 − ½."""
    assert generalised([0, 0, 1], [0.5, 0.5, 0.5], 1.0, 1.0) == ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0])
    # with smoothing 0 only the last token surprises
    assert generalised([0, 0, 1], [0.5, 0.5, 0.5], 1.0, 0.0)[0] == [0.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="3 rewards and 2 values"):
        generalised([0, 0, 1], [0.5, 0.5])


def test_a_batch_is_credited_token_by_token() -> None:
    """Against the estimate of each rollout, normalised over the tokens of those that have a score."""
    pick = random.Random(1)
    scores = [1.0, None, 0.0, 0.5]
    values = [[pick.gauss(0, 1) for _ in range(length)] for length in (3, 2, 1, 4)]
    advantages, returns = credited(scores, values, 0.9, 0.8)
    plain = {
        i: generalised([0.0] * (len(values[i]) - 1) + [score], values[i], 0.9, 0.8)
        for i, score in enumerate(scores)
        if score is not None
    }
    tokens = [a for row, _ in plain.values() for a in row]
    for i, (row, targets) in plain.items():
        assert advantages[i] == pytest.approx([(a - mean(tokens)) / (std(tokens) + EPS) for a in row])
        assert returns[i] == pytest.approx(targets)
    assert (advantages[1], returns[1]) == ([0.0, 0.0], values[1])
    assert credited([None], [[1.0]]) == ([[0.0]], [[1.0]])
    with pytest.raises(ValueError, match=r"rollout 1 .*must be finite"):
        credited([0.0, math.inf], [[0.0], [0.0]])


def test_the_soft_punishment_of_length_by_hand() -> None:
    """DAPO's with a limit of 20 and a margin of 4: free up to 16, −½ at 18, −1 from 20 on."""
    assert [overlong(n, 20, 4) for n in (1, 16, 17, 18, 20, 25)] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="margin of 30 tokens does not fit a limit of 20"):
        overlong(3, 20, 30)


def test_length_is_punished_beside_the_reward_and_a_failure_stays_one() -> None:
    def rollout(length: int) -> Rollout:
        return Rollout((5,) * length, (0.0,) * length, (0,) * length, "", "stop")

    scores = (Score("scored", 1.0, {"answer": 1.0}), Score("scored", 0.5), Score("failed", note="why"))
    group = Group(Prompt("k", "s", "q", (1,)), (1,), (rollout(20), rollout(3), rollout(20)), scores)
    (found,) = punish_length([group], 20, 4)
    assert [score.value for score in found.scores] == [0.0, 0.5, None]
    assert found.scores[0].parts == {"answer": 1.0, "overlong": -1.0}
    assert found.scores[2] == scores[2]
