"""Is the boxed answer right?"""

from __future__ import annotations

import re
from fractions import Fraction

import math_verify

from rewards.base import Item
from rlhf.types import Score

# Longer than any answer of a sane row; what is longer is compared as text, so that no parser runs for minutes.
MAX_EXPRESSION = 200
# Powers and factorials can be short and still need more memory than there is: 9^9^9^9.
RUNAWAY = re.compile(r"(\^|\*\*)\s*\{?\s*[-+(]?\d{3}|(\^|\*\*)\s*(\{[^}]*|[(\w\s]+)(\^|\*\*)|([)}]\s*(\^|\*\*).*){3}|!")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
NUMBER = re.compile(r"[+-]?\d{1,30}(\.\d{1,30})?")
BRACE = re.compile(r"\\boxed\s*\{|[{}]")
MATHEMATICS = re.compile(r"[\d\\^=+*/]")


def boxed(item: Item) -> Score:
    """1.0 when the last \\boxed{…} of the completion is the row's column `answer`, else 0.0.

    A list ("3 5 8" or "3, 5, 8") must have the same elements in the same order, and is not the number 358. Numbers and
    expressions are compared by value (math-verify), anything else as text without case and spacing.
    Raises KeyError when the row has no `answer`.
    """
    answer = str(item.prompt.columns["answer"])
    found = last_boxed(item.completion)
    if found is None:
        return Score("scored", 0.0, note="no boxed answer")
    said = found[0]
    return Score("scored", 1.0 if same(said, answer) else 0.0, note=f"boxed {said!r}, right is {answer!r}")


def final_answer(text: str) -> str:
    r"""What a completion says in the end, without Markdown around it: the last \boxed{…} after its last </think>, or of
    all; else what follows that </think>, or an "answer:" in it; else all of it."""
    after = text.rpartition("</think>")[2]
    if (found := last_boxed(after) or last_boxed(text)) is not None:
        return found[0]
    text = after
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    said = re.split(
        r"answer(?: is)?\s*[:：]\s*|answer is\s|答案(?:是|为)?\s*[:：]\s*|答案(?:是|为)", text, flags=re.IGNORECASE
    )[-1]
    return said.strip().strip("*_").strip()


def last_boxed(text: str) -> tuple[str, int] | None:
    r"""What the last complete \boxed{…} holds (nested braces included) and where it ends; None without one."""
    found, opened = None, list[int | None]()  # of each open brace, where what it holds begins if it is a box's
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace.end() if len(brace[0]) > 1 else None)
        elif opened and (start := opened.pop()) is not None and (found is None or start > found[0]):
            found = start, brace.start()
    return None if found is None else (text[found[0] : found[1]].strip(), found[1] + 1)


def same(said: str, answer: str) -> bool:
    """Whether two answers are the same list, value or text."""
    said, answer = _plain(said), _plain(answer)
    if NUMBER.fullmatch(answer) and THOUSANDS.fullmatch(said):
        said = said.replace(",", "")
    if said == answer:
        return True
    one, other = _elements(said), _elements(answer)
    # [0, 1) is not [0, 1], but (3, 5) may be written 3, 5
    alike = _brackets(said) == _brackets(answer) or "" in {_brackets(said), _brackets(answer)}
    if alike and (len(one) > 1 or len(other) > 1):
        if one == other:
            return True
        if all(NUMBER.fullmatch(part) for part in [*one, *other]):
            return len(one) == len(other) and all(Fraction(a) == Fraction(b) for a, b in zip(one, other, strict=True))
        one, other = _listed(said), _listed(answer)
        if (len(one) > 1 or len(other) > 1) and all(map(_mathematical, [*one, *other])):
            # math-verify takes a list for a set
            return len(one) == len(other) and all(map(same, one, other))
    elif NUMBER.fullmatch(said) and NUMBER.fullmatch(answer):
        return Fraction(said) == Fraction(answer)
    return _mathematical(said) and _mathematical(answer) and _equal_value(said, answer)


def _listed(text: str) -> list[str]:
    """What commas part, outside brackets; a set in braces is one thing."""
    text, depth, parts = text.strip("[]()") if _brackets(text) else text, 0, [""]
    for letter in text:
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _plain(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.strip().strip("$").rstrip(".").casefold().split())


def _elements(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text.strip("[]()")) if part]


def _brackets(text: str) -> str:
    return text[0] + text[-1] if re.fullmatch(r"[\[(].*[\])]", text) else ""


def _mathematical(text: str) -> bool:
    return len(text) <= MAX_EXPRESSION and MATHEMATICS.search(text) is not None and RUNAWAY.search(text) is None


def _equal_value(said: str, answer: str) -> bool:
    # no alarm signals: rewards also run off the main thread, and the reward's process has the deadline
    gold = math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    target = math_verify.parse(f"\\boxed{{{said}}}", parsing_timeout=None)
    return bool(math_verify.verify(gold, target, timeout_seconds=None))
