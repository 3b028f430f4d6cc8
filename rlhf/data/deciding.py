"""Questions that are easy or hard by their picture alone: when to think (SAIL-RL 2511.02280), on handwritten digits.

Easy are four digits alike, which show their answer; hard are four of which three or more differ. The words of a
question say nothing of which it is, and a chain takes as many tokens of the one as of the other. A reply judges, thinks
or does not, and answers:

    <judge>alike, answer.</judge><think></think>\\boxed{28}
    <judge>mixed, think.</judge><think>i see 3, 5, 8 and 1. 3 + 5 = 8. 8 + 8 = 16. 16 + 1 = 17. so 17.</think>…
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf.data.building import built, options_of, require_table, takes
from rlhf.data.chains import Chain, write_chain
from rlhf.data.digits import QUESTIONS, Puzzle, label, picture, row_of, scans, told
from rlhf.data.rows import DataError, Row

__all__ = ["Options", "build"]

NUM_DIGITS = 4
CATEGORIES = ("sum", "larger", "sorted")  # questions that four digits alike answer, too
LEAST_DIFFERENT = 3  # digits of a hard picture
SEEN = {"easy": "alike", "hard": "mixed"}


@dataclass(frozen=True)
class Options:
    """wavering: the share of rows whose choice to think is a coin's, though the judgement names what is seen; always:
    every row thinks; augmentation 0 (centred, upright size) to 1."""

    wavering: float = 0.0
    always: bool = False
    augmentation: float = 1.0


def build(table: str, rows: int, split: str, seed: int, options: Mapping[str, Any]) -> list[Row]:
    """`rows` rows of one table, the same for the same arguments, half of them easy.

    judged       judgement, chain or none, answer
    judged_text  the same without a picture, the digits given in the text
    prompts      no answer (for reinforcement learning, and to be measured on)

    Columns: complexity ("easy", "hard"), and those of the digits builder. split "heldout" is of held-out scans.
    Raises DataError for an unknown table or option.
    """
    makers: dict[str, Callable[[random.Random, Options, str, int], Row]] = {
        "judged": _judged_row,
        "judged_text": _judged_text_row,
        "prompts": _prompt_row,
    }
    require_table("deciding", makers, table, split)
    chosen = options_of("deciding", Options, options)
    for name in ("wavering", "augmentation"):
        if not 0 <= getattr(chosen, name) <= 1:
            raise DataError(f"{name} {getattr(chosen, name)}: from 0 to 1")
    return built("deciding", makers, table, rows, split, seed, chosen)


def _judged_row(rng: random.Random, options: Options, split: str, turn: int) -> Row:
    complexity, puzzle = _drawn(rng, split, turn)
    reply = _reply(complexity, puzzle, rng, options, turn)
    image = picture(puzzle.scans, rng, split, options.augmentation)
    return {**row_of(puzzle, puzzle.question, reply, True, image), "complexity": complexity}


def _judged_text_row(rng: random.Random, options: Options, split: str, turn: int) -> Row:
    complexity, puzzle = _drawn(rng, split, turn)
    reply = _reply(complexity, puzzle, rng, options, turn)
    return {**row_of(puzzle, f"{told(puzzle, rng)} {puzzle.question}", reply, True, None), "complexity": complexity}


def _prompt_row(rng: random.Random, options: Options, split: str, turn: int) -> Row:
    complexity, puzzle = _drawn(rng, split, turn)
    image = picture(puzzle.scans, rng, split, options.augmentation)
    return {**row_of(puzzle, puzzle.question, None, True, image), "complexity": complexity}


def _drawn(rng: random.Random, split: str, turn: int) -> tuple[str, Puzzle]:
    """Every second turn is easy; what is asked is drawn alike for both."""
    category = rng.choice(CATEGORIES)
    question = rng.choice(QUESTIONS[category])
    complexity = "easy" if turn % 2 == 0 else "hard"
    if complexity == "easy":
        indices = rng.sample(_scans_of(split)[rng.randrange(10)], NUM_DIGITS)
    else:
        indices = rng.sample(scans(split), NUM_DIGITS)
        while len(set(map(label, indices))) < LEAST_DIFFERENT:
            indices = rng.sample(scans(split), NUM_DIGITS)
    return complexity, Puzzle(category, question, tuple(map(label, indices)), None, tuple(indices))


@cache
def _scans_of(split: str) -> tuple[tuple[int, ...], ...]:
    """The scans of each digit."""
    return tuple(tuple(index for index in scans(split) if label(index) == digit) for digit in range(10))


def _reply(complexity: str, puzzle: Puzzle, rng: random.Random, options: Options, turn: int) -> str:
    # turns in pairs: both of a pair waver or neither, so that as many easy rows do as hard ones
    wavers = takes(turn // 2, options.wavering)
    thinks = options.always or (rng.random() < 0.5 if wavers else complexity == "hard")
    chain = write_chain(Chain(puzzle.category, puzzle.digits), rng)
    if not thinks:
        chain = f"<think></think>\\boxed{{{puzzle.answer}}}"
    return f"<judge>{SEEN[complexity]}, {'think' if thinks else 'answer'}.</judge>{chain}"
