"""Rewards changed by what is known of the rollout alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rlhf.types import Group, Rollout, Score


def overlong(length: int, limit: int, margin: int) -> float:
    """DAPO's soft punishment of long replies (arXiv:2503.14476, eq. 13): 0 up to limit − margin tokens, falling to −1
    at `limit`, −1 beyond. Raises ValueError unless 0 < margin ≤ limit."""
    if not 0 < margin <= limit:
        raise ValueError(f"a margin of {margin} tokens does not fit a limit of {limit}: it must be in 1 … {limit}")
    return max(-1.0, min(0.0, (limit - margin - length) / margin))


def punish_length(groups: Sequence[Group], limit: int, margin: int) -> list[Group]:
    """The groups with `overlong` added to every score, and named among its parts."""
    return [
        replace(group, scores=tuple(_punished(score, rollout, limit, margin) for score, rollout in _pairs(group)))
        for group in groups
    ]


def _pairs(group: Group) -> Iterator[tuple[Score, Rollout]]:
    return zip(group.scores, group.rollouts, strict=True)


def _punished(score: Score, rollout: Rollout, limit: int, margin: int) -> Score:
    if score.value is None:
        return score
    punishment = overlong(len(rollout.token_ids), limit, margin)
    return replace(score, value=score.value + punishment, parts={**score.parts, "overlong": punishment})
