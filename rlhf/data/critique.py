"""What a careful judge says of a chain of thought about digits: finding by finding, then yes or no.

The words are made for a small judge to learn (DECISIONS.md, "The judge goes through the chain").
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator, Iterator, Sequence
from itertools import zip_longest

from rlhf.data.chains import (
    FORM,
    answer_of,
    listed,
    numbers_text,
    parse_conclusion,
    parse_list,
    parse_reading,
    sentences_of,
    yes_or_no,
)

STEP = {
    "sum": re.compile(r"\d+ \+ \d+ = \d+"),
    "difference": re.compile(r"\d+ - \d+ = \d+"),
    "larger": re.compile(r"\d or \d: \d|of \d and \d, \d"),
}

Finding = tuple[str, str, str]  # of a judge: what is asked, the right result, what the reply says


def critique_of(category: str, digits: Sequence[int], text: str, target: int | None = None) -> str:
    """What a careful judge of an image of `digits` says of a reply, written by `write_chain` or by a model.

    It goes through the reply and, before each thing the reply says, works out by itself what should stand there: each
    digit it sees, the result of each step from what the reply said before, the conclusion, the box. Then it copies what
    does stand there ("-": nothing) and says bad where the two differ. The verdict is yes when nothing was bad. For an
    image of 3 and 5, and "i see 3 and 6. 3 + 6 = 8. so 8.":

        see 3 3. 5 6 bad. 3 + 6 = 9 8 bad. so 8 8. box 8 8. no

    It expects the steps that `write_chain` writes, in their order, and finds fault with other ways to the same end that
    `check_chain` accepts.
    """
    form = FORM.fullmatch(text)
    if form is None:
        return "no"
    findings = list(_findings(category, digits, sentences_of(form[1]), numbers_text(form[2]), target))
    sound = all(right == said for _, right, said in findings)
    return " ".join([*(compared(*finding) for finding in findings), "yes" if sound else "no"])


def _findings(
    category: str, digits: Sequence[int], sentences: Sequence[str], boxed: str | None, target: int | None
) -> Iterator[Finding]:
    reading, *claims = sentences or [""]
    conclusion = claims.pop() if claims else ""
    seen = parse_reading(reading) or []
    yield from _pairs(listed(digits), listed(seen), "see")
    result = yield from _step_findings(category, seen, claims, target)
    # a sentence too many leaves the conclusion without its step
    concluded = None if claims else parse_conclusion(category, conclusion)
    yield from _pairs(result, concluded or "", "so")
    yield from _pairs(concluded or result, boxed or "", "box")


def _step_findings(
    category: str, seen: Sequence[int], claims: list[str], target: int | None
) -> Generator[Finding, None, str]:
    """Findings on the steps between reading and conclusion, each from what was said before it; takes the sentences it
    finds out of `claims` and returns the result they lead to."""
    if not seen:
        return ""
    if category in ("sum", "larger"):
        return (yield from _running(category, seen, claims))
    if category == "difference":
        high, low = max(seen), min(seen)
        said = _claimed(category, (high, low), claims, 1)
        yield f"{high} - {low} =", str(high - low), said or "-"
        return said or str(high - low)
    if category == "sorted":
        match = re.fullmatch(r"(?:smallest|start with) (.+)", claims.pop(0) if claims else "")
        order = (parse_list(match[1]) if match else None) or []
        yield from _pairs(listed(sorted(seen)), listed(order), "order")
        return listed(order or sorted(seen))
    if category == "count" and target is not None:
        return (yield from _hits(seen, claims, target))
    return answer_of(category, seen, target)


def _running(category: str, seen: Sequence[int], claims: list[str]) -> Generator[Finding, None, str]:
    """A sum or a maximum, one more digit a step."""
    result = seen[0]
    for left, digit in zip(range(len(seen) - 1, 0, -1), seen[1:], strict=True):
        adds = category == "sum"
        right = result + digit if adds else max(result, digit)
        said = _claimed(category, (result, digit), claims, left)
        yield f"{result} + {digit} =" if adds else f"{result} or {digit}:", str(right), said or "-"
        result = int(said or right)
    return str(result)


def _hits(seen: Sequence[int], claims: list[str], target: int) -> Generator[Finding, None, str]:
    """Which digits are the one that is counted, all in one sentence."""
    words = claims.pop(0).split(", ") if claims else []
    hits = 0
    for digit, word in zip_longest(map(str, seen), words[: len(seen)], fillvalue=""):
        right = yes_or_no(digit == str(target))
        said = word.removeprefix(f"{digit} ") if word.startswith(f"{digit} ") else ""
        yield digit, right, said or "-"
        hits += (said or right) == "yes"
    yield from _pairs("", " ".join(word.partition(" ")[0] for word in words[len(seen) :]))
    return str(hits)


def _claimed(category: str, operands: tuple[int, int], claims: list[str], left: int) -> str | None:
    """The result that the next sentence gives for `operands`, if it is about them. It is taken out of `claims` then, or
    when no more than the `left` steps would remain without a sentence: then it stands in the step's place."""
    if not claims:
        return None
    *about, result = re.findall(r"\d+", claims[0]) if STEP[category].fullmatch(claims[0]) else [""]
    wanted = list(map(str, operands))
    follows = about == wanted or (category != "difference" and about == wanted[::-1])
    if follows or len(claims) >= left:
        del claims[0]
    return result if follows else None


def compared(asks: str, right: str, said: str) -> str:
    """One finding of a critique: "8 + 5 = 13 12 bad.", "8 + 5 = 13 13."."""
    return " ".join([*([asks] if asks else []), right, said]) + ("." if right == said else " bad.")


def _pairs(right: str, said: str, label: str = "") -> list[Finding]:
    """Findings that compare two lists element by element, `label` before the first; "-": one that is missing."""
    pairs = zip_longest(right.split(), said.split(), fillvalue="-")
    return [(label if place == 0 else "", one, other) for place, (one, other) in enumerate(pairs)]


def write_fact(rng: random.Random) -> str:
    """One small truth in the words of a chain or of a critique: a sum, a difference, the larger of two, same or not.

    No false claims to find fault with: they taught false sums (thinking accuracy 0.56 instead of 0.61 after stage A).
    """
    one, other = rng.randrange(10), rng.randrange(10)
    match rng.choice(("sum", "difference", "larger", "same")):
        case "sum":
            total = sum(rng.randrange(10) for _ in range(rng.choice((1, 1, 2, 3))))
            return f"{total} + {one} = {total + one}."
        case "difference":
            return f"{max(one, other)} - {min(one, other)} = {abs(one - other)}."
        case "larger":
            return rng.choice(("{} or {}: {}.", "of {} and {}, {}.")).format(one, other, max(one, other))
        case _:
            number = one if rng.random() < 0.6 else rng.randrange(10, 40)
            near = number + rng.choice((-10, -2, -1, 1, 2, 10)) if number > 9 else other
            return compared("", str(number), str(number if rng.random() < 0.5 else near))
