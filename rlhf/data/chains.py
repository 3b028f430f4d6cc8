"""Chains of thought about digits: written from the truth, corrupted in known ways, and verified by a program.

A chain reads the digits, takes the steps its category needs, and concludes; the boxed answer follows:

    <think>i see 3, 5 and 8. 3 + 5 = 8. 8 + 8 = 16. so 16.</think>\\boxed{16}
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

KINDS = {
    "read": "perception",
    "count": "perception",
    "sum": "reasoning",
    "difference": "reasoning",
    "larger": "reasoning",
    "sorted": "reasoning",
}
CATEGORIES = tuple(KINDS)
# how often each is drawn
CORRUPTIONS = {"wrong_digit": 4, "wrong_arithmetic": 3, "missing_step": 2, "wrong_conclusion": 3}

CONCLUSIONS = {
    "read": ("so {}.", "they read {}."),
    "count": ("so {}.", "there are {}."),
    "sum": ("so {}.", "sum {}.", "total {}."),
    "difference": ("so {}.", "the difference is {}."),
    "larger": ("so {}.", "the largest is {}."),
    "sorted": ("so {}.", "in order {}."),
}

FORM = re.compile(r"\s*<think>([^<>]*)</think>\s*\\boxed\{([^{}]*)\}\s*")

# what a weak reader of handwriting takes each digit for
CONFUSED = ((6, 8), (7, 4), (7, 3), (5, 8), (9, 1), (3, 9), (0, 8), (1, 2), (3, 6), (4, 5))


@dataclass(frozen=True)
class Chain:
    """What a chain will say. digits: those it reads. slips: the indices of the steps that go wrong, skipped: of the
    one left out. concluded and boxed: said instead of what the steps give."""

    category: str
    digits: tuple[int, ...]
    target: int | None = None
    slips: frozenset[int] = frozenset()
    skipped: int | None = None
    concluded: str | None = None
    boxed: str | None = None


@dataclass(frozen=True)
class ChainCheck:
    """sound: every step is true of the image and follows. reason: the first fault, empty when sound."""

    sound: bool
    reason: str = ""


def answer_of(category: str, digits: Sequence[int], target: int | None = None) -> str:
    """The true answer, as it stands in the box: a number, or digits with a space between them."""
    match category:
        case "read":
            return " ".join(map(str, digits))
        case "count":
            return str(len(digits) if target is None else list(digits).count(target))
        case "sum":
            return str(sum(digits))
        case "difference":
            return str(max(digits) - min(digits))
        case "larger":
            return str(max(digits))
        case "sorted":
            return " ".join(map(str, sorted(digits)))
    raise ValueError(f"no category {category!r}; the categories are {', '.join(CATEGORIES)}")


def write_chain(chain: Chain, rng: random.Random) -> str:
    """The chain in one of its phrasings, think tags and boxed answer included."""
    steps, result = _steps(chain, rng)
    concluded = result if chain.concluded is None else chain.concluded
    boxed = concluded if chain.boxed is None else chain.boxed
    conclusion = rng.choice(CONCLUSIONS[chain.category]).format(concluded)
    sentences = [_reading(chain.digits, rng), *filter(None, steps), conclusion]
    return f"<think>{' '.join(sentences)}</think>\\boxed{{{boxed}}}"


def corrupt(chain: Chain, rng: random.Random) -> tuple[str, Chain]:
    """One of CORRUPTIONS and the sound `chain` with it, as a weak model would write it: digits misread, left out,
    seen double or in another's place, or steps that are false, everything after consistent with them; a step left out;
    or an answer that does not follow.

    One fault is often not alone: where the picture nearly always shows what the chain says, a judge learns to copy the
    chain instead of looking.
    """
    steps = {"wrong_arithmetic": _slippable(chain), "missing_step": _skippable(chain)}
    possible = {kind: share for kind, share in CORRUPTIONS.items() if steps.get(kind, [0])}
    (kind,) = rng.choices(list(possible), list(possible.values()))
    if kind == "wrong_digit":
        return kind, replace(chain, digits=_misread(chain, rng))
    if kind == "wrong_arithmetic":
        return kind, replace(chain, slips=frozenset(_some(steps[kind], rng)))
    if kind == "missing_step":
        return kind, replace(chain, skipped=rng.choice(steps[kind]))
    wrong = _other_answer(chain.category, answer_of(chain.category, chain.digits, chain.target), rng)
    return kind, replace(chain, concluded=wrong) if rng.random() < 0.5 else replace(chain, boxed=wrong)


def spoil(chain: Chain, share: float, rng: random.Random) -> Chain:
    """The sound `chain` with each of its parts wrong with probability `share`: digits, steps, conclusion, box.

    For a judge to learn from. Where nearly everything a reply says is right, a judge learns to copy: what it reads in
    the reply for what it sees, what it worked out for what the reply says.
    """
    digits = tuple(mistaken(digit, rng) if rng.random() < share else digit for digit in chain.digits)
    chain = replace(chain, digits=digits)
    if rng.random() < share / 2:
        chain = replace(chain, digits=_misread(chain, rng))
    chain = replace(chain, slips=frozenset(step for step in _slippable(chain) if rng.random() < share))
    if rng.random() < share / 2 and (skippable := _skippable(chain)):
        chain = replace(chain, skipped=rng.choice(skippable))
    right = answer_of(chain.category, chain.digits, chain.target)
    if rng.random() < share:
        right = _other_answer(chain.category, right, rng)
        chain = replace(chain, concluded=right)
    return replace(chain, boxed=_other_answer(chain.category, right, rng)) if rng.random() < share else chain


def check_chain(category: str, digits: Sequence[int], text: str, answer: str, target: int | None = None) -> ChainCheck:
    """Verify a free-form `<think>…</think>\\boxed{…}` against the image's true digits, step by step.

    Sound means: it reads exactly `digits` in order; every step is true and uses the digits or the running result,
    each once; it concludes what the last step gave; the box holds that, and it is `answer`. `target` is the digit
    counted by "how many sevens". What cannot be parsed is unsound, with the reason.
    """
    outer = FORM.fullmatch(text)
    if outer is None:
        return ChainCheck(False, "not of the form <think>…</think>\\boxed{…}")
    sentences = sentences_of(outer[1])
    if len(sentences) < 2:
        return ChainCheck(False, "the chain needs at least a reading and a conclusion")
    seen = parse_reading(sentences[0])
    if seen is None:
        return ChainCheck(False, f"cannot parse the reading {sentences[0]!r}")
    if seen != list(digits):
        return ChainCheck(False, f"reads {listed(seen)}, the image has {listed(digits)}")
    try:
        result = _verify_steps(category, list(digits), sentences[1:-1], target)
    except _FaultError as fault:
        return ChainCheck(False, str(fault))
    concluded = parse_conclusion(category, sentences[-1])
    if concluded is None:
        return ChainCheck(False, f"cannot parse the conclusion {sentences[-1]!r}")
    if concluded != result:
        return ChainCheck(False, f"concludes {concluded}, the steps give {result}")
    boxed = numbers_text(outer[2])
    if boxed != concluded:
        return ChainCheck(False, f"boxes {outer[2].strip()!r}, the conclusion is {concluded}")
    if boxed != numbers_text(answer):
        return ChainCheck(False, f"answers {boxed}, the right answer is {answer}")
    return ChainCheck(True)


def _reading(digits: Sequence[int], rng: random.Random) -> str:
    words = [str(digit) for digit in digits]
    spoken = " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
    return rng.choice(
        (
            f"i see {spoken}.",
            f"the digits are {', '.join(words)}.",
            f"reading {' '.join(words)}.",
            f"first {', then '.join(words)}.",
        )
    )


def _steps(chain: Chain, rng: random.Random) -> tuple[list[str], str]:
    """The sentences between reading and conclusion (empty: left out), and the result they lead to."""
    digits, slips, skipped = chain.digits, chain.slips, chain.skipped
    steps: list[str] = []
    match chain.category:
        case "sum":
            total = digits[0]
            for i, digit in enumerate(digits[1:]):
                right = str(total + digit)
                given = right if i not in slips else _other_answer("sum", right, rng)
                steps.append(f"{total} + {digit} = {given}." if i != skipped else "")
                total = int(given)
            return steps, str(total)
        case "difference":
            right = str(max(digits) - min(digits))
            result = right if not slips else _other_answer("difference", right, rng)
            return [f"{max(digits)} - {min(digits)} = {result}." if skipped is None else ""], result
        case "larger":
            best = digits[0]
            form = rng.choice(("{} or {}: {}.", "of {} and {}, {}."))
            for i, digit in enumerate(digits[1:]):
                winner = max(best, digit) if i not in slips else min(best, digit)
                steps.append(form.format(best, digit, winner) if i != skipped else "")
                best = winner
            return steps, str(best)
        case "sorted":
            order = sorted(digits)
            for slip in slips:
                order[slip], order[slip + 1] = order[slip + 1], order[slip]
            sentence = f"{rng.choice(('smallest', 'start with'))} {', then '.join(map(str, order))}."
            return [sentence if skipped is None else ""], listed(order)
        case "count" if chain.target is not None:
            said = [(digit == chain.target) != (i in slips) for i, digit in enumerate(digits)]
            shown = [f"{digit} {yes_or_no(said[i])}" for i, digit in enumerate(digits) if i != skipped]
            return [f"{', '.join(shown)}." if shown else ""], str(sum(said))
    return steps, answer_of(chain.category, digits, chain.target)


def yes_or_no(hit: bool) -> str:
    """How a count says of a digit whether it is the one that is counted."""
    return "yes" if hit else "no"


def _slippable(chain: Chain) -> list[int]:
    """The steps that can go wrong: where the wrong choice differs from the right one."""
    digits = chain.digits
    match chain.category:
        case "sum":
            return list(range(len(digits) - 1))
        case "difference":
            return [0]
        case "larger":
            return [i for i in range(len(digits) - 1) if max(digits[: i + 1]) != digits[i + 1]]
        case "sorted":
            order = sorted(digits)
            return [i for i in range(len(order) - 1) if order[i] != order[i + 1]]
        case "count" if chain.target is not None:
            return list(range(len(digits)))
    return []


def _some(indices: Sequence[int], rng: random.Random) -> list[int]:
    """One of them, and each of the others two times in five."""
    first = rng.choice(indices)
    return [index for index in indices if index == first or rng.random() < 0.4]


def _skippable(chain: Chain) -> list[int]:
    """The steps that can be left out."""
    match chain.category:
        case "sum" | "larger":
            return list(range(len(chain.digits) - 1))
        case "difference" | "sorted":
            return [0]
        case "count" if chain.target is not None:
            return list(range(len(chain.digits)))
    return []


def _misread(chain: Chain, rng: random.Random) -> tuple[int, ...]:
    digits = list(chain.digits)
    place = rng.randrange(len(digits))
    draw = rng.random()
    # a difference has exactly two digits, and a sum of one digit would have no step
    least, most = (2, 2) if chain.category == "difference" else (1 if KINDS[chain.category] == "perception" else 2, 4)
    if draw < 0.2 and len(digits) > least:
        del digits[place]
    elif draw < 0.4 and len(digits) < most:
        digits.insert(place, rng.choice((digits[place], rng.randrange(10))))
    elif draw < 0.55 and place and digits[place] != digits[place - 1]:
        digits[place - 1], digits[place] = digits[place], digits[place - 1]
    else:
        for other in _some(range(len(digits)), rng):
            digits[other] = mistaken(digits[other], rng)
    return tuple(digits)


def mistaken(digit: int, rng: random.Random) -> int:
    """Another digit, mostly one that it is taken for."""
    return rng.choice(CONFUSED[digit] if rng.random() < 0.7 else [d for d in range(10) if d != digit])


def _other_answer(category: str, right: str, rng: random.Random) -> str:
    """A wrong answer close to the right one; only a sum can be above 9."""
    numbers = [int(word) for word in right.split()]
    if category in ("read", "sorted") and rng.random() < 0.3:
        place = rng.randrange(len(numbers))
        shorter = numbers[:place] + numbers[place + 1 :]
        return listed(
            shorter if shorter and rng.random() < 0.5 else [*numbers[:place], numbers[place], *numbers[place:]]
        )
    if len(numbers) > 1 and len(set(numbers)) > 1 and rng.random() < 0.5:
        first, second = rng.choice([(i, j) for i in range(len(numbers)) for j in range(i) if numbers[i] != numbers[j]])
        numbers[first], numbers[second] = numbers[second], numbers[first]
        return listed(numbers)
    place = rng.randrange(len(numbers))
    steps = (-10, -2, -1, 1, 2, 10) if numbers[place] > 9 else (-2, -1, 1, 2)
    limit = 99 if category == "sum" else 9
    numbers[place] = rng.choice([n for n in (numbers[place] + step for step in steps) if 0 <= n <= limit])
    return listed(numbers)


class _FaultError(Exception):
    """A step that is false, missing or not understood."""


def listed(numbers: Sequence[int]) -> str:
    """Numbers as an answer has them: "3 5 8"."""
    return " ".join(map(str, numbers))


def numbers_text(text: str) -> str | None:
    """Numbers between spaces or commas, listed; None where anything but numbers stands."""
    words = text.replace(",", " ").split()
    return listed([int(word) for word in words]) if words and all(re.fullmatch(r"\d{1,4}", w) for w in words) else None


def sentences_of(chain: str) -> list[str]:
    """Lower case, white space squeezed, without their full stops; empty ones left out."""
    sentences = [" ".join(part.split()).lower() for part in chain.split(".")]
    return [sentence for sentence in sentences if sentence]


def parse_list(text: str) -> list[int] | None:
    """Digits between spaces, commas, `and` or `then`."""
    words = re.split(r",? and |,? then |, | ", text)
    return [int(word) for word in words] if all(re.fullmatch(r"\d", word) for word in words) else None


def parse_reading(sentence: str) -> list[int] | None:
    """The digits that the first sentence of a chain reads; None where it does not."""
    match = re.fullmatch(r"(?:i see|the digits are|reading|first) (.+)", sentence)
    return parse_list(match[1]) if match else None


def parse_conclusion(category: str, sentence: str) -> str | None:
    """The numbers of a last sentence in the words of the category; None for other words."""
    openings = "|".join(form.partition(" {}")[0] for form in CONCLUSIONS[category])
    match = re.fullmatch(rf"(?:{openings}|the answer is|so the answer is) ([\d ,]+)", sentence)
    return numbers_text(match[1]) if match else None


def _verify_steps(category: str, digits: list[int], steps: list[str], target: int | None) -> str:
    """The result the steps lead to. Raises _FaultError at the first that is not right."""
    match category:
        case "sum":
            return str(_verify_sum(digits, steps))
        case "larger":
            return str(_verify_larger(digits, steps))
        case "difference":
            match = re.fullmatch(r"(\d+) - (\d+) = (\d+)", _only(steps))
            if match is None:
                raise _FaultError(f"cannot parse the step {steps[0]!r}")
            high, low, gap = map(int, match.groups())
            if [high, low] != sorted(digits, reverse=True):
                raise _FaultError(
                    f"{steps[0]!r} does not subtract the smaller from the larger digit of {listed(digits)}"
                )
            if high - low != gap:
                raise _FaultError(f"{steps[0]!r} is false")
            return str(gap)
        case "sorted":
            match = re.fullmatch(r"(?:smallest|start with) (.+)", _only(steps))
            order = parse_list(match[1]) if match else None
            if order is None:
                raise _FaultError(f"cannot parse the step {steps[0]!r}")
            if order != sorted(digits):
                raise _FaultError(f"{steps[0]!r} is not {listed(digits)} in order")
            return listed(order)
        case "count" if target is not None:
            said = re.findall(r"(\d) (yes|no)(?:, |$)", _only(steps))
            if ", ".join(f"{digit} {word}" for digit, word in said) != steps[0]:
                raise _FaultError(f"cannot parse the step {steps[0]!r}")
            if said != [(str(digit), "yes" if digit == target else "no") for digit in digits]:
                raise _FaultError(f"{steps[0]!r} does not say which of {listed(digits)} is a {target}")
            return str(sum(word == "yes" for _, word in said))
        case "read" | "count":
            if steps:
                raise _FaultError(f"cannot parse the step {steps[0]!r}")
            return answer_of(category, digits)
    raise _FaultError(f"no rules for category {category!r}")


def _only(steps: list[str]) -> str:
    if len(steps) != 1:
        raise _FaultError(f"{len(steps)} steps between reading and conclusion, one is needed")
    return steps[0]


def _verify_sum(digits: list[int], steps: list[str]) -> int:
    left = Counter(digits)
    total: int | None = None
    for step in steps:
        match = re.fullmatch(r"(\d+(?: \+ \d+)+) = (\d+)", step)
        if match is None:
            raise _FaultError(f"cannot parse the step {step!r}")
        terms = Counter(int(term) for term in match[1].split(" + "))
        if total is not None:
            if not terms[total]:
                raise _FaultError(f"{step!r} does not go on from {total}")
            terms[total] -= 1
        if terms - left:
            raise _FaultError(f"{step!r} adds a digit that is not left of {listed(digits)}")
        left = left - terms
        total = sum(terms.elements()) + (total or 0)
        if total != int(match[2]):
            raise _FaultError(f"{step!r} is false")
    if total is None or left:
        raise _FaultError(f"the steps leave out {listed(sorted(left.elements()))}")
    return total


def _verify_larger(digits: list[int], steps: list[str]) -> int:
    best, rest = digits[0], digits[1:]
    if len(steps) != len(rest):
        raise _FaultError(f"{len(steps)} comparisons of {len(digits)} digits, {len(rest)} are needed")
    for step, digit in zip(steps, rest, strict=True):
        match = re.fullmatch(r"(\d) or (\d): (\d)", step) or re.fullmatch(r"of (\d) and (\d), (\d)", step)
        if match is None:
            raise _FaultError(f"cannot parse the step {step!r}")
        one, other, winner = map(int, match.groups())
        if sorted((one, other)) != sorted((best, digit)):
            raise _FaultError(f"{step!r} does not compare {best} with {digit}")
        if winner != max(one, other):
            raise _FaultError(f"{step!r} is false")
        best = winner
    return best
