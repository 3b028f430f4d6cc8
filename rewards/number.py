"""Is the number right? With a tolerance, in whatever unit, counted, or read off a chart."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

from rewards.answer import final_answer
from rewards.base import Item
from rlhf.types import Score

PERCENT = "%"
SUPERSCRIPT = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
# how LaTeX and typography write what pint and Python read
WRITTEN: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:text|mathrm|mbox|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b"), "°"),
    (re.compile(r"\s*(?:\\times|×|\\cdot|·)\s*10\s*(?:\^|\*\*)\s*\{?\s*([-+−]?\d{1,3})\s*\}?"), r"e\1"),
    (re.compile(r"\^\s*\{\s*(-?\d)\s*\}"), r"^\1"),
    (re.compile(r"\\[,;:! ]|~|\\quad\b"), " "),
    (re.compile(r"\\%|\bper ?cent\b", re.IGNORECASE), PERCENT),
    (re.compile(r"\\mu\b|μ"), "µ"),
    (re.compile(r"\\Omega\b|\u2126"), "Ω"),
    (re.compile(r"[−–](?=\d)"), "-"),
    (re.compile(r"([⁺⁻]?)([⁰¹²³⁴⁵⁶⁷⁸⁹]+)"), lambda found: "^" + found[0].translate(SUPERSCRIPT)),
]
LONGEST = 200  # characters of an answer that is parsed at all
NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d{1,30})?(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d{1,30})?")
WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
CHINESE = dict(zip("零一二三四五六七八九十", range(11), strict=True)) | {"两": 2}


def close(item: Item, relative: float = 1e-3, absolute: float = 0.0) -> Score:
    """1.0 where the final answer is the row's `answer` within a tolerance, else 0.0. Units are converted (pint): "1.5
    km" is "1500 m"; where only one of them has a unit it is taken to be the same. "12 %" is 0.12 and 12."""
    said, truth = final_answer(item.completion), str(item.columns["answer"])
    wanted, found = measured(truth), measured(said)
    if wanted is None:
        return Score("failed", note=f"the row's answer {truth!r} is no number; use another reward for it")
    if found is None:
        return Score("scored", 0.0, note=f"{said!r:.80} is no number")
    right = any(
        math.isclose(one, other, rel_tol=relative, abs_tol=absolute) for one, other in _comparable(found, wanted)
    )
    return Score("scored", float(right), note=f"{said!r:.80}, right is {truth!r}")


def relaxed(item: Item, tolerance: float = 0.05) -> Score:
    """ChartQA's relaxed accuracy (arXiv:2203.10244): a number may be off by 5 %, other answers are compared as text
    without case and spacing; a list has as many elements, each right."""
    said, truth = final_answer(item.completion), str(item.columns["answer"])
    theirs, ours = ([part.strip() for part in re.split(r"[,;]\s+|\|", text)] for text in (said, truth))
    right = len(theirs) == len(ours) and all(map(lambda a, b: _near(a, b, tolerance), theirs, ours))
    return Score("scored", float(right), note=f"{said!r:.80}, right is {truth!r}")


def count(item: Item, slack: int = 0) -> Score:
    """1.0 where the last whole number of the final answer, in digits or words (English to twenty, Chinese to ten), is
    at most `slack` from the row's `answer`, else 0.0."""
    truth = int(float(item.columns["answer"]))
    found = _counted(final_answer(item.completion))
    right = found is not None and abs(found - truth) <= slack
    return Score("scored", float(right), note=f"{found}, right is {truth}")


def plain(text: str) -> float | None:
    """The number a text is, all of it: 1,234.5, 3/4, 2e-3, 12 %, −5, 3 × 10^5; None for anything else."""
    text = _tidy(text)
    percent = text.endswith(PERCENT)
    text = text.rstrip("% ")
    if len(text) > LONGEST or not text or NUMBER.fullmatch(text) is None:
        return None
    try:
        value = float(Fraction("".join(text.replace(",", "").split())))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value / 100 if percent else value


def measured(text: str) -> tuple[float, Any] | None:
    """Number and unit (None where there is none) that a text is; None for anything else."""
    text = _tidy(text)
    if (value := plain(text)) is not None:
        return value, PERCENT if text.endswith(PERCENT) else None
    head = NUMBER.match(text)
    if head is None or not head[0] or len(text) > LONGEST:
        return None
    value, unit = plain(head[0]), text[head.end() :].strip().replace("^", "**")
    # only words, powers and slashes: nothing that pint would have to compute
    if value is None or re.fullmatch(r"[A-Za-zµ°Ω]+(\*\*-?\d)?([ */·][A-Za-zµ°Ω]+(\*\*-?\d)?){0,4}", unit) is None:
        return None
    return value, _unit(unit.replace("°C", "degC").replace("°F", "degF").replace("°", "deg").replace("·", "*"))


def _tidy(text: str) -> str:
    """Without dollars, a full stop and LaTeX; what is longer than any answer stays as it is."""
    text = text.strip().strip("$").strip()
    if len(text) <= LONGEST:
        for pattern, plainly in WRITTEN:
            text = pattern.sub(plainly, text)
    return text.strip().rstrip(".").strip()


def _comparable(found: tuple[float, Any], wanted: tuple[float, Any]) -> list[tuple[float, float]]:
    """The pairs of numbers of which one must agree."""
    (one, unit), (other, theirs) = found, wanted
    if unit is None or theirs is None:
        # of 12 % the value is 0.12
        each = [value * 100 if isinstance(kind, str) and kind == PERCENT else value for value, kind in (found, wanted)]
        return [(one, other), (each[0], each[1])]
    if isinstance(unit, str) or isinstance(theirs, str):
        return [(one, other)] if isinstance(unit, str) and unit == theirs else []
    if unit.dimensionality != theirs.dimensionality:
        return []
    return [(_registry().Quantity(one, unit).to(theirs).magnitude, other)]


@cache
def _registry() -> Any:
    import pint

    return pint.UnitRegistry()


@cache
def _unit(text: str) -> Any:
    """pint's unit, as it stands (mW is not MW) or else without capitals (Meters, KM); or the word itself where it knows
    none: apples."""
    import pint

    for written in (text, text.lower()):
        with contextlib.suppress(
            pint.UndefinedUnitError, pint.DefinitionSyntaxError, ValueError, TypeError, AttributeError
        ):
            return _registry().Unit(written)
    return text.casefold()


def _near(said: str, truth: str, tolerance: float) -> bool:
    one, other = plain(said), plain(truth)
    if one is None or other is None:
        return " ".join(said.casefold().split()) == " ".join(truth.casefold().split())
    return math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance * abs(other))


def _counted(text: str) -> int | None:
    # whole runs: what is not understood is None, not the end of it
    pattern = rf"[-+−]?\d[\d,]*(?:\.\d+)?|(?<!-)\b(?:{'|'.join(WORDS)})\b(?!-)|[{''.join(CHINESE)}百千万]+"
    found = re.findall(pattern, text[-LONGEST:].casefold())
    if not found:
        return None
    last = found[-1].rstrip(",")
    if last in WORDS:
        return WORDS.index(last)
    if not last[-1].isdecimal():
        return CHINESE.get(last)
    value = plain(last)
    return int(value) if value is not None and value == int(value) else None
