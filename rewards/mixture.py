"""Several rewards as one: products and a weighted mean; and for which rows a part is there."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from simpleeval import EvalWithCompoundTypes, InvalidExpression

from rlhf.types import Outcome, Score


def combine(parts: Mapping[str, Score], weights: Mapping[str, float]) -> Score:
    """The weighted mean of the parts; `Score.parts` keeps each value, and as "NAME.part" what a part is itself made of.
    A part of weight 0 is only kept: it counts as a factor of another. One part that failed or timed out makes the whole
    so ("failed" where there are both), with all such parts in the note. Raises ValueError when the names of parts and
    weights differ or the weights sum to nothing."""
    if set(parts) != set(weights):
        raise ValueError(f"parts {sorted(parts)} and weights {sorted(weights)} must have the same names")
    total = sum(weights.values())
    if not total > 0:
        raise ValueError(f"the weights {dict(weights)} must sum to more than 0")
    values = {name: score.value for name, score in parts.items() if score.value is not None}
    kept = {f"{name}.{part}": value for name, score in parts.items() for part, value in score.parts.items()} | values
    broken = {name: score for name, score in parts.items() if score.outcome != "scored"}
    if broken:
        note = "; ".join(f"{name} {score.outcome}: {score.note}" for name, score in broken.items() if score.note)
        return Score(_worst(broken), None, kept, note)
    note = "; ".join(f"{name}: {score.note}" for name, score in parts.items() if score.note)
    return Score("scored", sum(values[name] * weights[name] / total for name in parts), kept, note)


def product(factors: Mapping[str, Score]) -> Score:
    """One factor of 0 makes the whole 0, as in SAIL-RL's R_judge · R_think · R_answer (arXiv:2511.02280); one that
    failed makes it fail, whatever the others are. What happened is in the factors' own notes."""
    broken = {name: score for name, score in factors.items() if score.outcome != "scored"}
    if broken:
        return Score(_worst(broken))
    return Score("scored", math.prod(score.value for score in factors.values() if score.value is not None))


def clipped(score: Score, bounds: tuple[float, float] | None) -> Score:
    """With its value inside [low, high]."""
    if bounds is None or score.value is None or bounds[0] <= score.value <= bounds[1]:
        return score
    value = min(max(score.value, bounds[0]), bounds[1])
    return Score(score.outcome, value, score.parts, f"{score.note} (clipped from {score.value:g})".strip())


def holds(condition: str, source: str, columns: Mapping[str, Any], row: str) -> bool:
    """Whether a `when` is true of a row: an expression in Python's syntax over its columns and, where these have none,
    `source`, the name of its data in the recipe. Raises ValueError that names the `row` for one that cannot be
    evaluated there."""
    names = {"source": source, **columns}
    try:
        return bool(EvalWithCompoundTypes(names=names, functions={}).eval(condition, parsed(condition)))
    except (InvalidExpression, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(
            f"when = {condition!r} cannot be evaluated for {row}: {error}; its columns are {', '.join(names)}"
        ) from error


@lru_cache(maxsize=64)
def parsed(condition: str) -> ast.expr:
    """A condition's syntax tree. Raises ValueError for what is no expression."""
    try:
        return ast.parse(condition.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"{condition!r} is no expression ({error.msg}); write one like \"source == 'stem'\""
        ) from error


def _worst(broken: Mapping[str, Score]) -> Outcome:
    return "failed" if any(score.outcome == "failed" for score in broken.values()) else "timed_out"
