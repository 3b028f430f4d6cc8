"""Rewards changed by what is known of the rollout alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf.types import Group, Score


def overlong(length: int, limit: int, margin: int) -> float:
    """DAPO's soft punishment of long replies (arXiv:2503.14476, eq. 13): 0 up to limit − margin tokens, falling to −1
    at `limit`, −1 beyond. Raises ValueError unless 0 < margin ≤ limit."""
    if not 0 < margin <= limit:
        raise ValueError(f"a margin of {margin} tokens does not fit a limit of {limit}: it must be in 1 … {limit}")
    return max(-1.0, min(0.0, (limit - margin - length) / margin))


def punish_length(groups: Sequence[Group], limit: int, margin: int) -> list[Group]:
    """The groups with `overlong` added to every score."""
    return [
        replace(
            group,
            scores=tuple(
                changed(score, "overlong", overlong(len(rollout.token_ids), limit, margin))
                for score, rollout in zip(group.scores, group.rollouts, strict=True)
            ),
        )
        for group in groups
    ]


def changed(score: Score, name: str, by: float) -> Score:
    """A score with `by` added, and named among its parts; a failure stays what it is."""
    if score.value is None:
        return score
    return replace(score, value=score.value + by, parts={**score.parts, name: by})
