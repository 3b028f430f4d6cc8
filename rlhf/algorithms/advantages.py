"""How good each rollout was: from the scores of a batch, one advantage a rollout; from a critic, one a token.

A None among the scores stands for a rollout whose reward failed or timed out: it is left out of every mean and std and
gets advantage 0; its sample must also have weight 0, so that it counts in no denominator. A failure is not a score of
0. std is the sample standard deviation (one degree of freedom removed), as in TRL and verl.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Scores = Sequence[Sequence[float | None]]
Advantages = list[list[float]]
EPS = 1e-6


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator. With `within_groups` rollouts are compared with those of their own group alone, so that
    a group whose scores are equal teaches nothing."""

    estimate: Callable[[Scores], Advantages]
    within_groups: bool


def group_normalised(groups: Scores) -> Advantages:
    """(score − mean) / (std + ε) within each group: GRPO (arXiv:2402.03300, §4.1.2), kept by DAPO and GSPO."""
    return [_scaled(_centred(group), _std(group)) for group in groups]


def group_centred(groups: Scores) -> Advantages:
    """score − mean within each group: Dr.GRPO (arXiv:2503.20783, §3.2), since dividing by the std prefers questions
    that are nearly always or nearly never answered."""
    return [_centred(group) for group in groups]


def leave_one_out(groups: Scores) -> Advantages:
    """score − mean of the group's other scores: RLOO (arXiv:2402.14740, eq. 8). With one known score there is no
    other, and the advantage is 0."""
    result = []
    for group in groups:
        known = len(_known(group))
        result.append([value * known / (known - 1) if known > 1 else 0.0 for value in _centred(group)])
    return result


def batch_normalised(groups: Scores) -> Advantages:
    """(score − mean) / (std + ε) over the whole batch: REINFORCE++ (arXiv:2501.03262), which needs no groups."""
    everything = [score for group in groups for score in group]
    return _regrouped(_scaled(_centred(everything), _std(everything)), groups)


def baseline_batch_normalised(groups: Scores) -> Advantages:
    """score − mean within each group, then divided by their std over the whole batch: REINFORCE++ with a baseline
    (arXiv:2501.03262). Groups of one score, or of equal ones, get 0 and count in the std."""
    centred = [
        [None if score is None else value for score, value in zip(group, _centred(group), strict=True)]
        for group in groups
    ]
    everything = [value for group in centred for value in group]
    return _regrouped(_scaled([value or 0.0 for value in everything], _std(everything)), groups)


ESTIMATORS = {
    "group_normalised": Estimator(group_normalised, within_groups=True),
    "group_centred": Estimator(group_centred, within_groups=True),
    "leave_one_out": Estimator(leave_one_out, within_groups=True),
    "batch_normalised": Estimator(batch_normalised, within_groups=False),
    "baseline_batch_normalised": Estimator(baseline_batch_normalised, within_groups=True),
}


def generalised(
    rewards: Sequence[float], values: Sequence[float], discount: float = 1.0, smoothing: float = 0.95
) -> tuple[list[float], list[float]]:
    """Generalised advantage estimation over one rollout of T tokens (GAE, arXiv:1506.02438, eq. 16): advantages [T] and
    returns [T], the critic's targets.

    rewards [T] after each token; values [T] the critic's before it; nothing follows the last token.
    advantage_t = Σ_k (discount · smoothing)^k δ_{t+k} with δ_t = reward_t + discount · value_{t+1} − value_t.
    """
    if len(rewards) != len(values):
        raise ValueError(f"{len(rewards)} rewards and {len(values)} values: one of each for every token")
    advantages = [0.0] * len(rewards)
    following = ahead = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        surprise = rewards[t] + discount * ahead - values[t]
        following = surprise + discount * smoothing * following
        advantages[t], ahead = following, values[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def credited(
    scores: Sequence[float | None], values: Sequence[Sequence[float]], discount: float = 1.0, smoothing: float = 0.95
) -> tuple[list[list[float]], list[list[float]]]:
    """Token by token, of a batch of rollouts whose only reward is their score, after the last token: advantages,
    brought to mean 0 and std 1 over the batch's tokens, and the critic's returns (PPO, arXiv:1707.06347, §5;
    normalised as in arXiv:2005.12729). A rollout without a score gets advantages 0, and its values back as returns."""
    _known(scores)
    found = [
        ([0.0] * len(said), list(said))
        if score is None
        else generalised([0.0] * (len(said) - 1) + [score], said, discount, smoothing)
        for score, said in zip(scores, values, strict=True)
    ]
    known = [a for (row, _), score in zip(found, scores, strict=True) if score is not None for a in row]
    mean, std = (statistics.fmean(known), _std(known)) if known else (0.0, 0.0)
    advantages = [
        [0.0] * len(row) if score is None else _scaled([a - mean for a in row], std)
        for (row, _), score in zip(found, scores, strict=True)
    ]
    return advantages, [returns for _, returns in found]


def _known(scores: Sequence[float | None]) -> list[float]:
    for position, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            raise ValueError(f"rollout {position} of the group has the score {score}; a reward must be finite")
    return [score for score in scores if score is not None]


def _std(scores: Sequence[float | None]) -> float:
    """0 for equal scores: their floats may differ from their own mean by rounding, which a tiny std would blow up."""
    known = _known(scores)
    return statistics.stdev(known) if known and min(known) != max(known) else 0.0


def _centred(scores: Sequence[float | None]) -> list[float]:
    known = _known(scores)
    if not known or min(known) == max(known):
        return [0.0] * len(scores)
    mean = statistics.fmean(known)
    return [0.0 if score is None else score - mean for score in scores]


def _scaled(centred: Sequence[float], std: float) -> list[float]:
    return [value / (std + EPS) for value in centred] if std else [0.0] * len(centred)


def _regrouped(flat: Sequence[float], groups: Scores) -> Advantages:
    values = iter(flat)
    return [[next(values) for _ in group] for group in groups]
