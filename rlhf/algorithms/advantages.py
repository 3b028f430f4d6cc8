"""How good each rollout of a group was, compared with its siblings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def group_normalised(scores: Sequence[float | None], eps: float = 1e-6) -> list[float]:
    """(score − mean) / (std + eps) within the group [G]: GRPO (arXiv:2402.03300, §4.1.2), kept by DAPO and GSPO.

    None stands for a rollout whose reward failed or timed out: it is left out of mean and std and gets advantage 0;
    its sample must also have weight 0, so that it counts in no denominator. A failure is not a score of 0.
    A group without variance, or with fewer than two scores, gets zeros. std is the sample standard deviation (one
    degree of freedom removed), as in TRL and verl. Raises ValueError for a score that is not finite.
    """
    known = [score for score in scores if score is not None]
    for position, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            raise ValueError(f"rollout {position} of the group has the score {score}; a reward must be finite")
    # equal floats may differ from their own mean by rounding, which dividing by a tiny std would blow up
    if not known or min(known) == max(known):
        return [0.0] * len(scores)
    mean, std = statistics.fmean(known), statistics.stdev(known)
    return [0.0 if score is None else (score - mean) / (std + eps) for score in scores]
