"""How many completions a second rule rewards score, in a worker of their own with the way there and back: one core. And
how many programs the sandbox runs: two cores.

python -m tests.bench.rewards
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import math_verify

from rewards.base import Item
from rewards.isolation import Isolated
from rlhf.types import Prompt

GROUPS, SIZE, CHUNK, TIMES = 64, 8, 64, 5


def items(answer: Callable[[random.Random], str], said: Callable[[str, random.Random], str]) -> list[Item]:
    """Of 64 prompts 8 completions each, about 60 words long."""
    rng, made = random.Random(0), list[Item]()
    for place in range(GROUPS):
        truth = answer(rng)
        prompt = Prompt(f"s/{place}", "s", "what is the sum?", tuple(range(60)), (), True, {"answer": truth})
        for _ in range(SIZE):
            chain = " ".join(rng.choice(["first", "then", "seven", "so", "3 + 5 = 8."]) for _ in range(60))
            made.append(Item(prompt, f"<think>{chain}</think>\\boxed{{{said(truth, rng)}}}", tuple(range(80)), True))
    return made


def a_second(score: Callable[[Sequence[Item]], object], rows: Sequence[Item]) -> float:
    """Completions a second, the median of some times."""
    found = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        for start in range(0, len(rows), CHUNK):
            score(rows[start : start + CHUNK])
        found.append(len(rows) / (time.perf_counter() - begun))
    return statistics.median(found)


def bare(rows: Sequence[Item]) -> list[bool]:
    """math-verify by itself."""
    return [
        bool(
            math_verify.verify(
                math_verify.parse(f"\\boxed{{{row.columns['answer']}}}", parsing_timeout=None),
                math_verify.parse(row.completion, parsing_timeout=None),
                timeout_seconds=None,
            )
        )
        for row in rows
    ]


def programs(number: int) -> list[Item]:
    """Short right ones, each with ten tests of what it prints and ten asserts."""
    columns = {
        "tests": [{"input": f"{n} 3\n", "output": f"{n + 3}\n"} for n in range(10)],
        "asserts": [f"assert add({n}, 3) == {n + 3}" for n in range(10)],
    }
    program = (
        "def add(a, b):\n    return a + b\n\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))\n"
    )
    prompt = Prompt("s/0", "s", "add two numbers", tuple(range(60)), (), True, columns)
    return [Item(prompt, f"<think>so</think>\n```python\n{program}```", tuple(range(80)), True)] * number


def main() -> None:
    whole = items(lambda rng: str(rng.randint(0, 99)), lambda truth, rng: truth if rng.random() < 0.5 else "7")
    parts = items(
        lambda rng: f"\\frac{{{rng.randint(1, 9)}}}{{{rng.randint(2, 9)}}}",
        lambda truth, rng: truth if rng.random() < 0.5 else "\\frac{3}{11}",
    )
    with Isolated() as process:
        for name, function, rows in (
            ("format", "rewards.format:think", whole),
            ("mathematics, whole numbers", "rewards.answer:boxed", whole),
            ("mathematics, fractions", "rewards.answer:boxed", parts),
        ):
            process.score(function, rows[:1])
            print(f"{name:28} {a_second(lambda some, f=function: process.score(f, some), rows):10,.0f} a second")  # type: ignore[misc]
        tested = programs(CHUNK // 4)
        for name, function, a_row in (
            ("programs", "rewards.code:inputs", 10),
            ("programs with asserts", "rewards.code:asserts", 1),
        ):
            assert {score.value for score in process.score(function, tested[:1])} == {1.0}
            rate = a_row * a_second(lambda some, f=function: process.score(f, some), tested)  # type: ignore[misc]
            print(f"{name:28} {rate:10,.0f} a second")
    print(f"{'math-verify, whole numbers':28} {a_second(bare, whole):10,.0f} a second")
    print(f"{'math-verify, fractions':28} {a_second(bare, parts):10,.0f} a second")


if __name__ == "__main__":
    main()
