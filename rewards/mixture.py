"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.types import Outcome, Score


def combine(parts: Mapping[str, Score], weights: Mapping[str, float]) -> Score:
    """The weighted mean of the parts; `Score.parts` keeps each value, and as "NAME.part" what a
    part is itself made of. One part that failed or timed out makes the
    whole so ("failed" where there are both), with all such parts in the note. Raises ValueError when the names of
    parts and weights differ or the weights sum to nothing."""
    if set(parts) != set(weights):
        raise ValueError(f"parts {sorted(parts)} and weights {sorted(weights)} must have the same names")
    total = sum(weights.values())
    if not total > 0:
        raise ValueError(f"the weights {dict(weights)} must sum to more than 0")
    values = {name: score.value for name, score in parts.items() if score.value is not None}
    own = {f"{name}.{part}": value for name, score in parts.items() for part, value in score.parts.items()}
    broken = {name: score for name, score in parts.items() if score.outcome != "scored"}
    if broken:
        outcome: Outcome = "failed" if any(score.outcome == "failed" for score in broken.values()) else "timed_out"
        note = "; ".join(f"{name} {score.outcome}: {score.note}" for name, score in broken.items())
        return Score(outcome, None, values | own, note)
    note = "; ".join(f"{name}: {score.note}" for name, score in parts.items() if score.note)
    return Score("scored", sum(values[name] * weights[name] / total for name in parts), values | own, note)
