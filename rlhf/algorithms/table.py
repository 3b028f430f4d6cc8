"""The algorithms by name: an advantage estimator, an objective, a normalisation and the clip range of its paper."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf.algorithms.advantages import ESTIMATORS, Estimator
from rlhf.recipe import Rl
from rlhf.types import Normalise


@dataclass(frozen=True)
class Algorithm:
    """What a name stands for; a recipe may change any part of it. clip_low and clip_high bound ratios to
    [1 − low, 1 + high]."""

    advantage: str  # of ESTIMATORS, or GENERALISED
    objective: str
    normalise: Normalise
    clip_low: float = 0.2
    clip_high: float = 0.2


GENERALISED = "generalised"  # token by token, from a critic: `rlhf.algorithms.advantages.credited`
ALGORITHMS = {
    "ppo": Algorithm(GENERALISED, "ppo", "token"),  # arXiv:1707.06347
    "grpo": Algorithm("group_normalised", "ppo", "row_mean"),  # arXiv:2402.03300
    "dr_grpo": Algorithm("group_centred", "ppo", "constant"),  # arXiv:2503.20783
    "dapo": Algorithm("group_normalised", "ppo", "token", clip_high=0.28),  # arXiv:2503.14476
    "gspo": Algorithm("group_normalised", "gspo", "row_mean", 3e-4, 4e-4),  # arXiv:2507.18071
    # arXiv:2506.13585, without a lower bound; the upper bound of 5 is ScaleRL's (arXiv:2510.13786)
    "cispo": Algorithm("group_normalised", "cispo", "token", 1.0, 4.0),
    "rloo": Algorithm("leave_one_out", "reinforce", "row"),  # arXiv:2402.14740
    "reinforce++": Algorithm("batch_normalised", "ppo", "token"),  # arXiv:2501.03262
    "reinforce++_baseline": Algorithm("baseline_batch_normalised", "ppo", "token"),
}


def estimator_of(stage: Rl) -> Estimator | None:
    """The stage's advantage estimator: its own, or its algorithm's (each that "auto" may mean compares in groups); None
    where a critic tells the tokens of a rollout apart, as `Rl.foretelling` has it."""
    named = ALGORITHMS["dapo" if stage.algorithm == "auto" else stage.algorithm]
    return ESTIMATORS.get(stage.advantage or named.advantage)


def method_of(stage: Rl, algorithm: str) -> Algorithm:
    """The algorithm of that name with what the stage changes of it."""
    changes = {
        name: getattr(stage, name)
        for name in ("advantage", "objective", "normalise", "clip_low", "clip_high")
        if getattr(stage, name) is not None
    }
    return replace(ALGORITHMS[algorithm], **changes)
