"""Questions about real handwritten digits: pictures of 1,797 scans (scikit-learn's load_digits), 2 × 2 to an image.

The scans are split once, for every seed and table: a held-out scan is never in a training row. Chains of thought are
written from the true digits, and `rlhf.data.chains.check_chain` verifies such chains.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rlhf.data.building import built, nearest, options_of, require_table, takes
from rlhf.data.chains import (
    CATEGORIES,
    KINDS,
    Chain,
    ChainCheck,
    answer_of,
    check_chain,
    corrupt,
    mistaken,
    spoil,
    write_chain,
)
from rlhf.data.critique import compared, critique_of, write_fact
from rlhf.data.judging import judge_question, parse_verdict, rate_question
from rlhf.data.rows import DataError, Row

__all__ = ["ChainCheck", "Options", "Puzzle", "build", "check_chain", "render", "scans"]

CELL = 24
FACTS_PER_ROW = 12
NUM_TRAIN = 1400
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = (*(f"{word}s" for word in WORDS[:6]), "sixes", *(f"{word}s" for word in WORDS[7:]))

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "read": ("read the digits.", "which digits are these?", "what do you read?"),
    "count": ("how many digits are there?", "count the digits."),
    "sum": ("what is the sum?", "add the digits.", "what is the total?"),
    "difference": ("what is the difference?", "how far apart are they?", "larger minus smaller?"),
    "larger": ("which is the largest?", "what is the largest digit?", "find the largest."),
    "sorted": ("sort the digits.", "put the digits in order.", "order from small to large."),
}
COUNT_OF = ("how many {} are there?", "count the {}.")


@dataclass(frozen=True)
class Options:
    """min_digits to max_digits a picture (1 to 4); categories asked; augmentation 0 (centred, upright size) to 1;
    critique: a judge goes through the chain before its verdict; corrupted: the share of corrupted chains it is shown;
    faults: with what probability each part of those is wrong (0: one kind of fault each, which the row names); signals:
    the tokens that say a picture is to be drawn."""

    min_digits: int = 1
    max_digits: int = 4
    categories: tuple[str, ...] = CATEGORIES
    augmentation: float = 1.0
    critique: bool = False
    corrupted: float = 0.5
    faults: float = 0.0
    signals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Puzzle:
    """One question with its truth. target: the digit to count, for "how many sevens"; scans: indices of load_digits."""

    category: str
    question: str
    digits: tuple[int, ...]
    target: int | None
    scans: tuple[int, ...]

    @property
    def answer(self) -> str:
        return answer_of(self.category, self.digits, self.target)


def build(table: str, rows: int, split: str, seed: int, options: Mapping[str, Any]) -> list[Row]:
    """`rows` rows of one table, the same for the same arguments.

    text        no image: the digits in words or numerals; half chains, half direct answers
    single      one digit, read
    perception  read and count, direct
    direct      every category, direct
    chains      every category, thinking
    pairs       the same, beside a corrupted chain as the `rejected` reply, and its kind of `corruption`
    prompts     every category, no answer (for reinforcement learning)
    judge       a reply to be judged beside the image: half sound, half corrupted; the answer is yes or no
    judge_text  the same, the digits given in the text
    rated       a caption to be rated beside the image, each digit wrong with probability `faults`: from 1, all wrong,
                to 5, all right; columns score, and sound: at least 3
    signals     no image: digits to draw; the answer is the tokens of option `signals`, what to draw in column signal
    facts       no image: a dozen small truths a reply, those that chains are made of and judges check

    split "heldout" makes any of them from held-out scans, with a third of the augmentation. Columns: answer, category,
    kind, digits, target, question, think, scans; judge tables add sound and corruption.
    Raises DataError for an unknown table or option.
    """
    makers: dict[str, Callable[[random.Random, Options, str, int], Row]] = {
        "text": _text_row,
        "single": _single_row,
        "perception": _direct_row,
        "direct": _direct_row,
        "chains": _chain_row,
        "pairs": _pair_row,
        "prompts": _prompt_row,
        "judge": _judge_row,
        "judge_text": _judge_text_row,
        "rated": _rated_row,
        "signals": _signal_row,
        "facts": _facts_row,
    }
    require_table("digits", makers, table, split)
    return built("digits", makers, table, rows, split, seed, _options(table, options))


@functools.cache
def scans(split: str) -> tuple[int, ...]:
    """Indices into load_digits of one split: 1,400 for training, 397 held out; fixed for ever."""
    order = list(range(len(_scans()[1])))
    random.Random("thinkfusion digits: which scans are held out").shuffle(order)
    return tuple(order[:NUM_TRAIN] if split == "train" else order[NUM_TRAIN:])


def render(indices: tuple[int, ...], rng: random.Random, augmentation: float) -> bytes:
    """PNG, 48 × 48 RGB: the scans in reading order, light ink on dark, each 18 to 22 pixels in its 24-pixel cell."""
    canvas = np.zeros((2 * CELL, 2 * CELL), dtype=np.uint8)
    for place, index in enumerate(indices):
        size = round(20 + rng.uniform(-2, 2) * augmentation)
        slack = (CELL - size) / 2
        left, top = (round(slack + rng.uniform(-slack, slack) * augmentation) for _ in range(2))
        contrast = 1 - rng.uniform(0, 0.3) * augmentation
        row, column = divmod(place, 2)
        y, x = row * CELL + top, column * CELL + left
        canvas[y : y + size, x : x + size] = ink(index, size, contrast)
    return as_png(canvas)


def picture(indices: tuple[int, ...], rng: random.Random, split: str, augmentation: float = 1.0) -> bytes:
    """Scans of a split, rendered; held-out ones with a third of the augmentation."""
    return render(indices, rng, augmentation * (1 if split == "train" else 1 / 3))


def ink(index: int, size: int, contrast: float = 1.0) -> npt.NDArray[np.uint8]:
    """One scan [size, size], light on dark."""
    scan = Image.fromarray(np.uint8(_scans()[0][index] * (255 / 16) * contrast))
    return np.asarray(scan.resize((size, size), Image.Resampling.BILINEAR))


def as_png(canvas: npt.NDArray[np.uint8]) -> bytes:
    """Grey levels [height, width] as a PNG in RGB."""
    buffer = io.BytesIO()
    Image.fromarray(canvas).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def label(index: int) -> int:
    """The digit that a scan shows."""
    return _scans()[1][index]


@functools.cache
def _scans() -> tuple[npt.NDArray[np.float64], tuple[int, ...]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, tuple(int(label) for label in data.target)


def _options(table: str, given: Mapping[str, Any]) -> Options:
    chosen = options_of("digits", Options, given)
    if not 1 <= chosen.min_digits <= chosen.max_digits <= 4:
        raise DataError(f"min_digits {chosen.min_digits}, max_digits {chosen.max_digits}: 1 ≤ min ≤ max ≤ 4 is needed")
    if not 0 <= chosen.augmentation <= 1:
        raise DataError(f"augmentation {chosen.augmentation}: from 0 to 1")
    for name in ("corrupted", "faults"):
        if not 0 <= getattr(chosen, name) <= 1:
            raise DataError(f"{name} {getattr(chosen, name)}: from 0 to 1")
    for category in chosen.categories:
        if category not in CATEGORIES:
            raise DataError(f"digits has no category {category!r}{nearest(category, list(CATEGORIES))}")
    asked = [c for c in chosen.categories if table != "perception" or KINDS[c] == "perception"]
    fitting = tuple(category for category in asked if _sizes(category, chosen))
    if not fitting:
        raise DataError(
            f"no category of {list(chosen.categories)} fits table {table!r} with {chosen.min_digits} to "
            f"{chosen.max_digits} digits; difference takes two digits, sum, larger and sorted take two or more"
        )
    return replace(chosen, categories=fitting)


def _sizes(category: str, options: Options) -> list[int]:
    low, high = {"read": (1, 4), "count": (1, 4), "difference": (2, 2)}.get(category, (2, 4))
    return list(range(max(low, options.min_digits), min(high, options.max_digits) + 1))


def draw_puzzle(rng: random.Random, options: Options, split: str) -> Puzzle:
    """A question of one of the options' categories about scans of a split."""
    category = rng.choice(options.categories)
    indices = tuple(rng.sample(scans(split), rng.choice(_sizes(category, options))))
    digits = tuple(_scans()[1][index] for index in indices)
    target = None
    question = rng.choice(QUESTIONS[category])
    if category == "count" and rng.random() < 0.5:
        # mostly a digit that is there, or "none" would be the safe guess
        target = rng.choice(digits) if rng.random() < 0.75 else rng.randrange(10)
        question = rng.choice(COUNT_OF).format(PLURALS[target])
    return Puzzle(category, question, digits, target, indices)


def row_of(puzzle: Puzzle, asked: str, reply: str | None, think: bool, image: bytes | None) -> Row:
    """A question about a puzzle, without a picture or an answer where there is none."""
    shown = [] if image is None else [{"type": "image"}]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": asked}]}]
    if reply is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return {
        "messages": messages,
        "images": [] if image is None else [{"bytes": image, "path": None}],
        "answer": puzzle.answer,
        "category": puzzle.category,
        "kind": KINDS[puzzle.category],
        "digits": list(puzzle.digits),
        "target": puzzle.target,
        "question": puzzle.question,
        "think": think,
        "scans": list(puzzle.scans),
    }


def _picture(puzzle: Puzzle, rng: random.Random, options: Options, split: str) -> bytes:
    return picture(puzzle.scans, rng, split, options.augmentation)


def told(puzzle: Puzzle, rng: random.Random) -> str:
    """The digits in the words of the question instead of in a picture."""
    names = [WORDS[digit] for digit in puzzle.digits] if rng.random() < 0.5 else [str(digit) for digit in puzzle.digits]
    return f"digits: {' '.join(names)}."


def _sound_chain(puzzle: Puzzle, rng: random.Random) -> str:
    return write_chain(Chain(puzzle.category, puzzle.digits, puzzle.target), rng)


def _direct(puzzle: Puzzle) -> str:
    return f"\\boxed{{{puzzle.answer}}}"


def _text_row(rng: random.Random, options: Options, split: str, turn: int) -> Row:
    puzzle = draw_puzzle(rng, options, split)
    think = turn % 2 == 0
    reply = _sound_chain(puzzle, rng) if think else _direct(puzzle)
    return row_of(puzzle, f"{told(puzzle, rng)} {puzzle.question}", reply, think, None)


def _single_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    index = rng.choice(scans(split))
    question = rng.choice(("which digit is this?", *QUESTIONS["read"]))
    puzzle = Puzzle("read", question, (_scans()[1][index],), None, (index,))
    return row_of(puzzle, question, _direct(puzzle), False, _picture(puzzle, rng, options, split))


def _direct_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    puzzle = draw_puzzle(rng, options, split)
    return row_of(puzzle, puzzle.question, _direct(puzzle), False, _picture(puzzle, rng, options, split))


def _chain_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    puzzle = draw_puzzle(rng, options, split)
    return row_of(puzzle, puzzle.question, _sound_chain(puzzle, rng), True, _picture(puzzle, rng, options, split))


def _pair_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    puzzle = draw_puzzle(rng, options, split)
    row = row_of(puzzle, puzzle.question, _sound_chain(puzzle, rng), True, _picture(puzzle, rng, options, split))
    kind, spoilt = corrupt(Chain(puzzle.category, puzzle.digits, puzzle.target), rng)
    return {**row, "rejected": write_chain(spoilt, rng), "corruption": kind}


def _prompt_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    puzzle = draw_puzzle(rng, options, split)
    return row_of(puzzle, puzzle.question, None, True, _picture(puzzle, rng, options, split))


@dataclass(frozen=True)
class _Judged:
    """A puzzle, a reply to it, the kind of corruption, what the judge should say of it, and whether it is sound."""

    puzzle: Puzzle
    text: str
    corruption: str
    verdict: str
    sound: bool

    def row(self, asked: str, image: bytes | None) -> Row:
        row = row_of(self.puzzle, asked + judge_question(self.puzzle.question, self.text), self.verdict, False, image)
        return {**row, "answer": "yes" if self.sound else "no", "sound": self.sound, "corruption": self.corruption}


def _judged(rng: random.Random, options: Options, split: str, turn: int) -> _Judged:
    puzzle = draw_puzzle(rng, options, split)
    kind, chain = "none", Chain(puzzle.category, puzzle.digits, puzzle.target)
    if takes(turn, options.corrupted):
        kind, chain = ("several", spoil(chain, options.faults, rng)) if options.faults else corrupt(chain, rng)
    text = write_chain(chain, rng)
    critique = critique_of(puzzle.category, puzzle.digits, text, puzzle.target)
    sound = bool(parse_verdict(critique))
    reply = critique if options.critique else critique.split()[-1]
    return _Judged(puzzle, text, "none" if sound else kind, reply, sound)


def _judge_row(rng: random.Random, options: Options, split: str, turn: int) -> Row:
    judged = _judged(rng, options, split, turn)
    return judged.row("", _picture(judged.puzzle, rng, options, split))


def _judge_text_row(rng: random.Random, options: Options, split: str, turn: int) -> Row:
    judged = _judged(rng, options, split, turn)
    return judged.row(f"{told(judged.puzzle, rng)} ", None)


def _rated_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    puzzle = replace(draw_puzzle(rng, options, split), category="read", target=None)
    said = [mistaken(digit, rng) if rng.random() < options.faults else digit for digit in puzzle.digits]
    right = sum(one == other for one, other in zip(said, puzzle.digits, strict=True))
    score = 1 + round(4 * right / len(said))
    findings = [compared("", str(one), str(other)) for one, other in zip(puzzle.digits, said, strict=True)]
    asked = rate_question(" ".join(map(str, said)))
    row = row_of(puzzle, asked, f"{' '.join(findings)}\n{score}", False, _picture(puzzle, rng, options, split))
    # as a judge of yes or no has it: three of five are kept (SAIL-Caption2)
    sound = {"sound": score >= 3, "corruption": "none" if score >= 3 else "wrong_digits"}
    return {**row, "answer": str(score), "score": score, **sound}


def _signal_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    if not options.signals:
        raise DataError("digits table 'signals' needs the option signals: the tokens of the bridge's head, in order")
    puzzle = draw_puzzle(rng, options, split)
    caption = " ".join(WORDS[digit] for digit in puzzle.digits)
    return row_of(puzzle, f"draw {caption}.", "".join(options.signals), False, None) | {"signal": caption}


def _facts_row(rng: random.Random, options: Options, split: str, _turn: int) -> Row:
    puzzle = draw_puzzle(rng, options, split)
    facts = [write_fact(rng) for _ in range(FACTS_PER_ROW)]
    return row_of(puzzle, "facts.", " ".join(facts), False, None)
