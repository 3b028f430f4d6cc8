"""Programs right and wrong, in both styles of tests, and programs that claim to have passed."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from rewards.base import Item, evaluate, resolve
from rewards.code import asserts, inputs, program_of
from rewards.isolation import Isolated, Limits
from rlhf.types import Prompt, Score

DOUBLE = [{"input": f"{n}\n", "output": f"{2 * n}\n"} for n in range(4)]


def item(program: str, **columns: object) -> Item:
    completion = f"<think>Let me think.</think>So:\n```python\n{program}\n```\nDone."
    return Item(Prompt("s/7", "s", "what?", (1,), (), True, columns), completion, (1, 2), True)


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na = 1\n```\nor\n```python\nb = 2\n```", "b = 2\n"),
        ("<think>```python\na\n```</think>\n```py\nb\n```", "b\n"),
        ("<think>\n```python\ndraft\n```\n</think>\n```\nb\n```", "b\n"),
        ("<think>\n```python\ndraft\n```\n</think>b = 1", "b = 1"),
        ("```python\na\n```\nwhich prints\n```\n3\n```", "a\n"),
        ("1. So:\n   ```Python\n   a\n   ```", "   a\n"),
        ("```python\na = '```'\n```", "a = '```'\n"),
        ("<think>how?</think>\nprint(1)\n", "print(1)"),
        ("print(1)", "print(1)"),
        ("<think>how?</think>\n", ""),
        ("```python\nnever closed", "```python\nnever closed"),
    ],
)
def test_the_program_of_a_completion(completion: str, program: str) -> None:
    assert program_of(completion) == program


# -- standard input and output


def test_a_right_program() -> None:
    assert inputs(item("print(2 * int(input()))", tests=DOUBLE)) == Score("scored", 1.0, note="4 of 4 tests")
    blanks = item("print(2 * int(input()), '  ')\nprint()", tests=DOUBLE)
    assert inputs(blanks).value == 1.0


@pytest.mark.parametrize(
    ("program", "value", "note"),
    [
        ("print(int(input()) ** 2)", 0.5, r"2 of 4 tests; test 2: expected '2\n', got '1\n'"),
        ("print(4)", 0.25, r"1 of 4 tests; test 1: expected '0\n', got '4\n'"),
        ("print('x' * 10000)", 0.0, "…"),
        ("n = int(input())\nprint(2 * n)\n1 / (n - 3)", 0.75, "test 4: it ended with status 1: ZeroDivisionError: "),
        ("print(", 0.0, "test 1: it ended with status 1: SyntaxError: '(' was never closed"),
        ("import os\nos._exit(0)", 0.0, r"test 1: expected '0\n', got ''"),
        ("print(open('/etc/passwd').read())", 0.0, "No such file or directory: '/etc/passwd'"),
    ],
)
def test_a_wrong_program(program: str, value: float, note: str) -> None:
    found = inputs(item(program, tests=DOUBLE))
    assert (found.outcome, found.value) == ("scored", value)
    assert note in found.note
    assert len(found.note) < 700
    assert inputs(item(program, tests=DOUBLE), all_or_nothing=True).value == 0.0


def test_all_or_nothing() -> None:
    right = inputs(item("print(2 * int(input()))", tests=DOUBLE), all_or_nothing=True)
    assert (right.value, right.note) == (1.0, "4 of 4 tests")
    wrong = inputs(item("print(int(input()) ** 2)", tests=DOUBLE), all_or_nothing=True)
    assert wrong.note == r"not all tests; test 2: expected '2\n', got '1\n'"


def test_time_for_all_tests_together() -> None:
    begun = time.monotonic()
    many = [{"input": str(n), "output": "0"} for n in range(20)]
    sleepy = inputs(
        item("import time\nif input() != '0': time.sleep(600)\nprint(0)", tests=many), seconds=2.0, cpu_seconds=30
    )
    assert (sleepy.outcome, sleepy.value) == ("scored", 0.05)
    assert "test 2: it took more than " in sleepy.note
    assert time.monotonic() - begun < 30
    busy = inputs(item("while True: pass", tests=DOUBLE[:1]), cpu_seconds=1)
    assert busy.note == "0 of 1 tests; test 1: it used more than 1 s of processor time"


@pytest.mark.parametrize("tests", [[], ["1"], [{"input": "1"}]])
def test_rows_that_have_no_tests(tests: object) -> None:
    with pytest.raises(ValueError, match=r"row s/7: tests must be a list of"):
        inputs(item("print(1)", tests=tests))
    with pytest.raises(KeyError, match="tests"):
        inputs(item("print(1)"))


# -- asserts

PROGRAM = """
import collections, enum
from dataclasses import dataclass

class Empty(ValueError):
    pass

class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, one): self.items.append(one); return self
    def pop(self):
        if not self.items: raise Empty("nothing there")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items

@dataclass
class Node:
    value: int
    next: "Node | None" = None

@dataclass(frozen=True, order=True)
class Money:
    cents: int
    def __add__(self, other): return Money(self.cents + other.cents)

class Colour(enum.Enum):
    RED = 1

def add(a, b=1): return a + b
def sort(xs): xs.sort()
def note(d, s): d["x"] = 1; s.add(2)
def count(text): return collections.Counter(text)
def pairs(n): return ((i, i * i) for i in range(n))
def apply(f, xs): return [f(x) for x in xs]
def length(node): return 0 if node is None else 1 + length(node.next)
def everything(): return [None, True, 2.5, 1 + 2j, "é", b"x", (1,), {1}, frozenset({2}), {"a": [1]}, range(3), 10**5000]
def fails(): raise KeyError("which")
"""
TESTS = """
import unittest
from solution import Stack, Node
assert add(2, 3) == 5
assert add(a=2) == 3
assert add(0.1, 0.2) != 0.3
assert abs(add(0.1, 0.2) - 0.3) < 1e-9
assert add("a", b="b") == "ab", "joined"
xs = [3, 1, 2]
sort(xs)
assert xs == [1, 2, 3]
d, s = {}, {1}
note(d, s)
assert (d, s) == ({"x": 1}, {1, 2})
assert count("aab") == {"a": 2, "b": 1}
assert list(pairs(3)) == [(0, 0), (1, 1), (2, 4)] and dict(pairs(2)) == {0: 0, 1: 1}
assert apply(lambda x: x + 1, [1, 2]) == [2, 3]
assert everything() == [None, True, 2.5, 1 + 2j, "é", b"x", (1,), {1}, frozenset({2}), {"a": [1]}, range(3), 10**5000]
assert Colour.RED is Colour.RED and Colour.RED.value == 1 and Colour(1) == Colour.RED
assert Money(1) + Money(2) == Money(3) and Money(1) < Money(2) and Money(1) != Money(2)

def test_stack():
    stack = Stack((1, 2))
    assert stack.push(3) == Stack((1, 2), 3) and stack.push([4]).pop() == [4]
    assert len(stack) == 2 and isinstance(stack, Stack) and not isinstance(3, Stack)

def test_nodes():
    head = Node(1)
    head.next = Node(2, None)
    assert length(head) == 2 and head.next.value == 2 and head.next.next is None

class TestErrors(unittest.TestCase):
    def setUp(self):
        self.stack = Stack()

    def test_own(self):
        with self.assertRaisesRegex(Empty, "nothing there"):
            self.stack.pop()
        with self.assertRaises(ValueError):
            self.stack.pop()

    def test_builtin(self):
        with self.assertRaises(KeyError):
            fails()
        with self.assertRaises(TypeError):
            add()
        with self.assertRaises(AttributeError):
            self.stack.nothing
"""


def test_what_tests_can_do_with_a_program() -> None:
    found = asserts(item(PROGRAM, test_code=TESTS))
    assert (found.value, found.note) == (1.0, f"{TESTS.count('assert ', 0, TESTS.index('def test')) + 4} of 17 tests")


def test_a_list_of_asserts() -> None:
    three = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add(2) == 3"]
    found = asserts(item(PROGRAM, asserts=three))
    assert found.value == pytest.approx(2 / 3)
    assert found.note == "2 of 3 tests; assert add(1, 2) == 4: AssertionError: expected 4, got 3"
    assert asserts(item(PROGRAM, asserts=three), all_or_nothing=True).value == 0.0
    assert asserts(item(PROGRAM, asserts=three[::2]), all_or_nothing=True).value == 1.0


def test_check_of_an_entry_point() -> None:
    check = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n"
    assert asserts(item("def f(x): return x + 1", test_code=check, entry_point="f")).value == 1.0
    assert asserts(item("def f(x): return 2", test_code=check, entry_point="f")).value == 0.0
    assert "KeyError: 'f'" in asserts(item("def g(x): return x + 1", test_code=check, entry_point="f")).note


def test_a_source_without_tests_is_one() -> None:
    whole = "for x in range(3):\n    assert f(x) == x + 1\n"
    assert asserts(item("def f(x): return x + 1", test_code=whole)) == Score("scored", 1.0, note="1 of 1 tests")
    assert asserts(item("def f(x): return x", test_code=whole)).note == "0 of 1 tests; the test: AssertionError"


def test_what_follows_a_failure_that_is_no_test_is_not_passed() -> None:
    source = "assert f(1) == 1\nx = f(0)\nassert x == 0\ndef test_f():\n    pass\n"
    found = asserts(item("def f(x): return x // x", test_code=source))
    assert found.value == pytest.approx(1 / 3)
    assert "assert x == 0: ZeroDivisionError" in found.note


def shouts(line: str) -> str:
    """Writes a line into whatever is open, many times."""
    return f"""import os
for n in range(3, 60):
  try: os.write(n, b'{line}\\n' * 50)
  except OSError: pass
"""


SEVEN = "def f(x): return 7"
CALL = '["call", [["builtin", "type"], ["list"], ["dict"]]]'
LIES = {
    "exit at once": "import sys\nsys.exit(0)",
    "end at once": "import os\nos._exit(0)",
    "exit when called": "import sys\ndef f(x): sys.exit(0)",
    "end when called": "import os\ndef f(x): os._exit(0)",
    "print what a report would say": 'def f(x):\n    print(\'1\\n["t", ""]\', flush=True)',
    "equal to everything": """class All:
  def __eq__(self, other): return True
  __ne__ = __lt__ = __gt__ = __ge__ = __eq__
  def __hash__(self): return 0
  def __sub__(self, other): return self
  __rsub__ = __abs__ = __sub__
def f(x): return All()""",
    "an int that is equal to everything": """class All(int):
  def __eq__(self, other): return True
  def __hash__(self): return 0
def f(x): return All(7)""",
    "built-ins of its own": f"def abs(x): return 0\ndef isinstance(*_): return True\n{SEVEN}",
    "patched built-ins": f"import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = None\n{SEVEN}",
    "patched unittest": f"""import unittest
unittest.TestCase.assertEqual = lambda *_: None
unittest.TestCase.debug = lambda _: None
{SEVEN}""",
    "patched conversation": f"import __main__\n__main__.examine = __main__._tried = lambda *_: ''\n{SEVEN}",
    "an error that is none": "def f(x): raise SystemExit(0)",
    "a skip": "import unittest\ndef f(x): raise unittest.SkipTest",
    "the line, by itself": shouts('["value", {}]') + SEVEN,
    "calls of what it was not given": shouts(CALL) + SEVEN,
    "such calls, later": f"CALL = {shouts(CALL)!r}\ndef f(x): exec(CALL)",
    "an answer of rubbish": shouts("rubbish") + "os._exit(0)",
    "never": "def f(x):\n  while True: pass",
    "the end of memory": "def f(x): return '7' * (1 << 29)",
}
ASKED = """
import unittest
assert f(1) == 2
assert 2 == f(1)
assert abs(f(1) - 2) < 1e-9
assert isinstance(f(1), int) and f(1) == 2
assert f(1) in (2, 2.0)
class TestF(unittest.TestCase):
    def test_f(self):
        self.assertEqual(f(1), 2)
def test_f():
    assert f(1) == 2
"""


@pytest.mark.parametrize("way", LIES)
def test_nobody_passes_by_claiming(way: str) -> None:
    found = asserts(item(LIES[way], test_code=ASKED), cpu_seconds=2)
    assert (found.outcome, found.value) == ("scored", 0.0), found
    assert found.note


def test_the_truth_passes() -> None:
    assert asserts(item("def f(x): return x + 1", test_code=ASKED)).value == 1.0


def test_what_remains_the_programs_word() -> None:
    """As its module says: objects of its own classes, compared with each other."""
    lie = "class All:\n  def __eq__(self, other): return True\ndef f(x): return All()"
    assert asserts(item(lie, asserts=["assert f(1) == f(2)"])).value == 1.0
    assert asserts(item(lie, asserts=["assert f(1) == [f(1)]"])).value == 0.0


def test_tests_that_are_no_python() -> None:
    with pytest.raises(ValueError, match=r"row s/7: the test 'assert f\(' is no Python"):
        asserts(item("def f(x): pass", asserts=["assert f("]))
    with pytest.raises(KeyError, match="test_code"):
        asserts(item("def f(x): pass"))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"test_code": "def check(f):\n    assert f() == 1"}, "tests nothing; name what it checks in `entry_point`"),
        ({"test_code": "import math\ndef helper(): pass"}, "tests nothing; write asserts"),
        ({"test_code": "async def test_f():\n    assert 0"}, "tests nothing"),
        ({"test_code": ""}, "is empty"),
        ({"test_code": None, "asserts": None}, "is empty"),
    ],
)
def test_tests_that_nothing_could_fail_are_no_tests(columns: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        asserts(item("def f(): return 2", **columns))


def test_a_message_of_the_programs_own_replaces_nothing() -> None:
    """It finds the socket and speaks before what it runs in does: all is to be bool, which is true of [False]."""
    forged = '["value", ["dict", ["__builtins__", ["dict", ["all", ["builtin", "bool"]]]]]]'
    program = f"""import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, {forged!r}.encode() + bytes([10]))
    except OSError:
        pass
"""
    score = asserts(item(program, asserts=["assert all([False])"]))
    assert (score.outcome, score.value) == ("scored", 0.0), score


def test_long_words_cost_no_verdict() -> None:
    score = asserts(item("def f(): raise ValueError('x' * 3_000_000)", asserts=["assert f() == 1", "assert f() == 2"]))
    assert (score.outcome, score.value) == ("scored", 0.0)
    score = asserts(item("raise ValueError('x' * 3_000_000)", asserts=["assert f() == 1"]))
    assert (score.outcome, score.value) == ("scored", 0.0)


def test_no_program() -> None:
    empty = Item(
        Prompt("s/7", "s", "what?", (1,), (), True, {"tests": DOUBLE, "asserts": ["assert f"]}),
        "<think>…</think>",
        (1,),
        True,
    )
    assert inputs(empty) == asserts(empty) == Score("scored", 0.0, note="no program")


def test_by_name_in_a_worker(tmp_path: Path) -> None:
    right, wrong = "def f(x): return 2 * x\nif __name__ == '__main__': print(f(int(input())))", "while True: pass"
    rows = [item(program, tests=DOUBLE, asserts=["assert f(2) == 4"]) for program in (right, wrong, right)]
    with Isolated(Limits(20.0, 1.0)) as process:
        for name in ("rewards.code:inputs", "rewards.code:asserts"):
            scores = process.score(name, rows, {"cpu_seconds": 1, "all_or_nothing": True, "seconds": 10.0})
            assert [score.value for score in scores] == [1.0, 0.0, 1.0], scores
            assert "processor time" in scores[1].note
        assert process.restarts == 0
    assert [s.outcome for s in evaluate(resolve("rewards.code:inputs"), [item(right)])] == ["failed"]
