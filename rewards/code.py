"""Does the program do what it should? Programs that a model wrote, run in a sandbox."""

from __future__ import annotations

import ast
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards.base import Item
from rewards.exchange import counted
from rewards.sandbox import Limits, Outcome, run
from rlhf.types import Score

PREPARING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
BLOCK = re.compile(r"^[ \t]*```(python|python3|py)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
EXCHANGE = Path(__file__).with_name("exchange.py").read_text()
SHOWN = 200  # characters of a value in a note
LATE = "there was no time left for it"


def inputs(
    item: Item,
    *,
    all_or_nothing: bool = False,
    seconds: float = 20.0,
    cpu_seconds: int = 6,
    memory_mib: int = 512,
    at_once: int = 3,
) -> Score:
    """The share of the row's `tests` that the program passes: a list of {"input", "output"}, the text it reads and the
    text it must print. Lines are compared without the blanks and the empty lines that end them.

    all_or_nothing: 1.0 where it passes all, else 0.0. cpu_seconds, memory_mib: of each test. seconds: of all of them by
    the clock, after which no test is passed; keep it below the deadline of rewards. at_once: how many tests run at a
    time. Raises KeyError when the row has no `tests`, ValueError for tests of another form, SandboxError where there is
    no sandbox.
    """
    tests = item.columns["tests"]
    if not tests or not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        raise ValueError(f'row {item.prompt.key}: tests must be a list of {{"input", "output"}}, not {_short(tests)}')
    program = program_of(item.completion)
    if not program:
        return Score("scored", 0.0, note="no program")
    end, failed = time.monotonic() + seconds, list[int]()

    def fault(place: int) -> str:
        """Why a test is not passed; "" where it is, or needs no answer any more."""
        if all_or_nothing and failed:
            return ""
        left = end - time.monotonic()
        if left <= 0:
            return LATE
        limits = Limits(left, cpu_seconds, memory_mib)
        found = _compared(run(program, str(tests[place]["input"]), limits), str(tests[place]["output"]))
        if found:
            failed.append(place)
        return found

    with ThreadPoolExecutor(at_once) as threads:
        faults = list(threads.map(fault, range(len(tests))))
    return _scored([(f"test {place + 1}", said) for place, said in enumerate(faults)], all_or_nothing)


def asserts(
    item: Item,
    *,
    all_or_nothing: bool = False,
    seconds: float = 20.0,
    cpu_seconds: int = 6,
    memory_mib: int = 512,
) -> Score:
    """The share of the row's asserts that hold of what the program defines: `asserts`, a list of statements; else
    `test_code`, in which each assert, function test_… and method of a TestCase is a test, and `check`, which is called
    with what `entry_point` names.

    The tests run in a sandbox of their own and ask the program for values (rewards/exchange.py): it cannot claim to
    have passed. all_or_nothing as of `inputs`; the limits are those of all tests together. Raises KeyError when the row
    has neither column, ValueError for tests that are no Python or test nothing, SandboxError where there is no sandbox.
    """
    columns = item.columns
    entry = str(columns.get("entry_point") or "")
    tests = [_tested(test, entry, item.prompt.key) for test in columns.get("asserts") or [columns["test_code"]]]
    program = program_of(item.completion)
    if not program:
        return Score("scored", 0.0, note="no program")
    limits = Limits(seconds, cpu_seconds, memory_mib)
    one, other = socket.socketpair()
    sides = {one: f"serve({one.fileno()}, {program!r})", other: f"examine({other.fileno()}, {tests!r}, {entry!r})"}
    with ThreadPoolExecutor(2) as threads:
        programs, examiner = threads.map(
            lambda line: run(f"{EXCHANGE}\n\n{sides[line]}\n", limits=limits, channel=line), sides
        )
    return _verdict(programs, examiner, all_or_nothing)


def program_of(completion: str) -> str:
    """Of what follows a completion's last </think>, or of all without one: the last block in ```python, else the last
    in bare ```, else all."""
    said = completion.rpartition("</think>")[2]
    blocks = BLOCK.findall(said)
    named = [text for language, text in blocks if language] or [text for _, text in blocks]
    return str(named[-1]) if named else said.strip()


def _tested(test: object, entry: str, row: str) -> str:
    """A test's source. Raises ValueError for one that no program could fail."""
    if not isinstance(test, str) or not test.strip():
        raise ValueError(f"row {row}: the test {_short(test)} is empty")
    try:
        tree = ast.parse(test)
    except SyntaxError as error:
        raise ValueError(f"row {row}: the test {_short(test)} is no Python: {error}") from error
    if list(counted(tree, entry)) == [""] and all(isinstance(statement, PREPARING) for statement in tree.body):
        checks = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
        advice = "name what it checks in `entry_point`" if checks else "write asserts, or test_… functions"
        raise ValueError(f"row {row}: the test {_short(test)} only defines, and tests nothing; {advice}")
    return test


def _compared(outcome: Outcome, expected: str) -> str:
    if outcome.fault or outcome.status != 0:
        return _ended(outcome)
    if _lines(outcome.output) != _lines(expected):
        return f"expected {_short(expected)}, got {_short(outcome.output)}"
    return ""


def _ended(outcome: Outcome) -> str:
    return outcome.fault or f"it ended with status {outcome.status}: {_last(outcome.error)}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _verdict(program: Outcome, examiner: Outcome, all_or_nothing: bool) -> Score:
    lines: list[Any] = [json.loads(line) for line in examiner.output.splitlines(keepends=True) if line.endswith("\n")]
    if lines and isinstance(lines[0], dict):
        return Score("scored", 0.0, note=_last(lines[0]["broken"]))
    if not lines:  # the tests had not begun
        return Score("scored", 0.0, note=examiner.fault or _ended(program))
    number, *told = lines
    why = program.fault or examiner.fault
    verdicts = [(str(name), f"{fault}; {why}" if fault and why else str(fault)) for name, fault in told]
    # of tests that were not reached, by whosever fault
    verdicts += [("the next test", why or _ended(examiner))] * (number - len(told))
    return _scored(verdicts, all_or_nothing)


def _scored(verdicts: list[tuple[str, str]], all_or_nothing: bool) -> Score:
    """Of names of tests and why each failed ("": it did not)."""
    wrong = [(name, fault) for name, fault in verdicts if fault]
    passed = len(verdicts) - len(wrong)
    value = float(not wrong) if all_or_nothing else passed / len(verdicts)
    if not wrong:
        return Score("scored", value, note=f"{passed} of {len(verdicts)} tests")
    name, fault = wrong[0]
    how_many = "not all" if all_or_nothing else f"{passed} of {len(verdicts)}"
    return Score("scored", value, note=f"{how_many} tests; {_cut(name)}: {_cut(fault, 3 * SHOWN)}")


def _last(error: str) -> str:
    """The last words of a traceback."""
    lines = error.strip().splitlines()
    return _cut(lines[-1]) if lines else "it said nothing"


def _short(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str, most: int = SHOWN) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
