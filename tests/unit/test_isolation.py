"""What user code may do to its process: each thing costs its own sample, is told, and stops nobody else."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import isolation
from rewards.base import Item, RewardError, resolve
from rewards.isolation import Isolated, Limits
from rlhf.types import Media, Prompt, Score

HERE = f"{__file__}:"
SECONDS = 2.0


def item(completion: str, **columns: object) -> Item:
    return Item(Prompt("s/0", "s", "what?", (1,), (), True, columns), completion, (1, 2), True)


HOARD: list[bytearray] = []


def quotes(item: Item) -> Score:
    HOARD.append(bytearray())
    return Score("scored", float(len(HOARD)), note=f"it said {item.completion}: MemoryError")


def keep(item: Item) -> float:
    HOARD.append(bytearray(40 << 20))
    return 1.0


class Noted(str):
    """Means nothing where it was not made."""

    __slots__ = ()

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return deed.__globals__["nowhere"], ("",)


def deed(item: Item) -> float | Score | None:
    match item.completion:
        case "raise":
            raise RuntimeError("the reason")
        case "hang":
            time.sleep(600)
        case "hang in C":  # holds the interpreter: neither thread nor signal handler of it would run
            re.match(r"(a+)+$", "a" * 40 + "b")
        case "exit":
            os._exit(3)
        case "raise SystemExit":
            sys.exit("bye")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leak":
            hoard = [bytearray(1 << 26) for _ in range(64)]  # 4 GiB
            return float(len(hoard))
        case "print":
            while True:
                print("and on " * 1000)
        case "fork":  # and both come back
            os.fork()
            return 0.5
        case "fork and wait":
            if os.fork() == 0:
                time.sleep(600)
            return 0.5
        case "start":
            subprocess.Popen(["sleep", "600"])
            return 0.5
        case "die later":
            threading.Timer(0.2, os._exit, [5]).start()
            return 0.5
        case "escape" | "escape and hang":  # to a session of its own, and to another parent
            if (child := os.fork()) == 0:
                os.setsid()
                if (left := os.fork()) == 0:
                    time.sleep(600)
                Path(item.columns["file"]).write_text(str(left))
                os._exit(0)
            os.waitpid(child, 0)
            time.sleep(600 if "hang" in item.completion else 0)
            return 0.5
        case "nan":
            return float("nan")
        case "a part that is none":
            return Score("scored", 1.0, {"part": float("inf")})
        case "an object":
            return Score("scored", Fraction(1, 2), {"part": Fraction(1, 4)}, Noted("why"))
        case "none":
            return None
    return 1.0


def together(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
    said = [completion[0]["content"] for completion in completions]
    if "exit" in said:
        os._exit(1)
    if "hang" in said:
        time.sleep(600)
    return [1.0] * (len(said) - ("short" in said))


async def later(item: Item) -> float:
    await asyncio.sleep(600 if item.completion == "hang" else 0)
    return 1.0


def threshold(bound: float):  # a factory, as TRL has some
    return lambda completions, **columns: [bound] * len(completions)


def scaled(item: Item, by: float = 1.0) -> float:
    return by * item.num_tokens


@pytest.fixture(scope="module")
def process() -> Iterator[Isolated]:
    with Isolated(Limits(SECONDS, 0.25)) as found:
        found.score(f"{HERE}deed", [item("fine")])  # has started
        yield found


@pytest.mark.parametrize(
    ("what", "outcome", "note"),
    [
        ("raise", "failed", "RuntimeError: the reason"),
        ("hang", "timed_out", "more than 2 s"),
        ("hang in C", "timed_out", "more than 2 s"),
        ("exit", "failed", "ended its process"),
        ("raise SystemExit", "failed", "ended its process"),
        ("kill", "failed", "ended its process"),
        ("leak", "failed", "MemoryError"),
        ("print", "timed_out", "it printed: "),
        ("fork", 0.5, ""),
        ("fork and wait", 0.5, ""),
        ("start", 0.5, ""),
        ("nan", "failed", "returned nan"),
        ("none", "failed", "returned None"),
        ("a part that is none", "failed", "part = inf"),
        ("an object", 0.5, "why"),
    ],
)
def test_a_deed_costs_its_own_sample(process: Isolated, what: str, outcome: object, note: str) -> None:
    begun = time.monotonic()
    scores = process.score(f"{HERE}deed", [item(said) for said in ("fine", what, "fine", what, "fine")])
    assert time.monotonic() - begun < 2 * SECONDS + 20
    assert [scores[place].value for place in (0, 2, 4)] == [1.0] * 3
    for place in (1, 3):
        assert (scores[place].value if scores[place].outcome == "scored" else scores[place].outcome) == outcome
        assert note in scores[place].note
    assert process.score(f"{HERE}deed", [item("fine")])[0].value == 1.0


@pytest.mark.parametrize(("what", "outcome"), [("exit", "failed"), ("hang", "timed_out"), ("short", "failed")])
def test_of_a_batch_the_one_that_does_it_is_found(process: Isolated, what: str, outcome: str) -> None:
    scores = process.score(f"{HERE}together", [item(said) for said in ("fine", what, "fine")])
    assert [score.outcome for score in scores] == ["scored", outcome, "scored"]


def test_tensors_are_numbers_where_they_hold_one(process: Isolated, tmp_path: Path) -> None:
    (tmp_path / "tensors.py").write_text(
        "import torch\n"
        "def ours(item): return torch.full((item.num_tokens - 1 if item.completion == 'one' else 2,), 0.25)\n"
        "def trls(completions, **_): return torch.arange(len(completions))\n"
    )
    one, two = process.score(f"{tmp_path}/tensors.py:ours", [item("one"), item("two")])
    assert (one.value, two.outcome, "Tensor" in two.note or "tensor" in two.note) == (0.25, "failed", True)
    assert [s.value for s in process.score(f"{tmp_path}/tensors.py:trls", [item("a"), item("b")])] == [0.0, 1.0]


def test_a_module_that_cannot_be_imported_is_no_sample(
    process: Isolated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(RewardError, match="as its module was imported, it ended its process"):
        process.score(f"{tmp_path}/ends.py:f", [item("x")])
    assert process.score(f"{HERE}scaled", [item("x")])[0].value == 2.0
    (tmp_path / "wrong_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="ZeroDivisionError: division by zero"):
        resolve("wrong_module:f")


def test_async_functions_run_at_once(process: Isolated) -> None:
    begun = time.monotonic()
    assert [score.value for score in process.score(f"{HERE}later", [item("fine")] * 50)] == [1.0] * 50
    assert time.monotonic() - begun < 5
    outcomes = [score.outcome for score in process.score(f"{HERE}later", [item("hang"), item("fine")])]
    assert outcomes == ["timed_out", "scored"]


def test_options(process: Isolated) -> None:
    assert process.score(f"{HERE}scaled", [item("x")], {"by": 0.25})[0].value == 0.5
    assert process.score(f"{HERE}threshold", [item("x")], {"bound": 0.75})[0].value == 0.75
    with pytest.raises(RewardError, match="unexpected keyword argument 'at'"):
        process.score(f"{HERE}scaled", [item("x")], {"at": 1})
    with pytest.raises(RewardError, match="has no function 'no'"):
        process.score(f"{HERE}no", [item("x")])


def test_who_dies_between_calls_is_replaced(process: Isolated) -> None:
    assert process.score(f"{HERE}deed", [item("die later")])[0].value == 0.5
    assert process._worker is not None
    assert select.select([process._worker.watch], [], [], 20.0)[0]
    assert process.score(f"{HERE}deed", [item("fine")])[0].value == 1.0


def test_memory_that_one_keeps_is_not_missed_by_the_next() -> None:
    with Isolated(Limits(20.0, 0.1)) as process:
        scores = process.score(f"{HERE}keep", [item("x")] * 4)
        # two fit; the third costs itself, and the fourth has a process that is not full
        assert [score.outcome for score in scores] == ["scored", "scored", "failed", "scored"]


def test_a_note_about_memory_ends_no_process() -> None:
    with Isolated(Limits(20.0, 0.1)) as process:
        for first in (1.0, 4.0):
            found = process.score(f"{HERE}quotes", [item("x")] * 3)
            assert [score.value for score in found] == [first, first + 1, first + 2]
        assert process.restarts == 0


def test_an_item_too_large_for_its_worker_is_its_own_failure() -> None:
    with Isolated(Limits(20.0, 0.05)) as process:
        small = [item("fine")] * 2
        assert [score.value for score in process.score(f"{HERE}deed", small)] == [1.0] * 2
        scores = process.score(f"{HERE}deed", [item("fine"), item("x" * (120 << 20)), item("fine")])
        assert [score.outcome for score in scores] == ["scored", "failed", "scored"]


def test_a_nursery_that_ended_is_replaced() -> None:
    with Isolated(Limits(20.0)) as process:
        assert process.score(f"{HERE}deed", [item("fine")])[0].value == 1.0
        assert process._nursery is not None
        process._nursery[0].kill()
        process._nursery[0].wait(timeout=20)
        assert process.score(f"{HERE}deed", [item("fine")])[0].value == 1.0


@pytest.mark.parametrize(("what", "outcome"), [("escape", "scored"), ("escape and hang", "timed_out")])
def test_what_goes_to_a_session_of_its_own_is_found(tmp_path: Path, what: str, outcome: str) -> None:
    """By the worker after its call, or by the nursery before the next."""
    file = tmp_path / "pid"
    with Isolated(Limits(0.5)) as process:
        assert process.score(f"{HERE}deed", [item(what, file=str(file))])[0].outcome == outcome
        assert process.score(f"{HERE}deed", [item("fine")])[0].value == 1.0
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_process_that_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Isolated(Limits(20.0)) as process:
        process.score(f"{HERE}deed", [item("fine")])
        monkeypatch.setattr(isolation, "START", 1.0)
        process._worker.line.close()
        process._worker = None
        process._start()
        os.kill(process._worker.pid, signal.SIGSTOP)
        scores = process.score(f"{HERE}deed", [item("x" * (16 << 20))])
        assert [score.outcome for score in scores] == ["failed"]
        assert "not taken" in scores[0].note
        assert process.score(f"{HERE}deed", [item("fine")])[0].value == 1.0


def test_nothing_is_left(tmp_path: Path) -> None:
    """Also where the caller is killed in the middle of a call that hangs."""
    script = (
        "from tests.unit.test_isolation import *\n"
        "process = Isolated(Limits(300))\n"
        "process.score(f'{HERE}deed', [item('fine')])\n"
        "print(process._worker.pid, process._nursery[0].pid, flush=True)\n"
        "process.score(f'{HERE}deed', [item('hang in C')])\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    pids = list(map(int, caller.stdout.readline().split()))
    watched = [os.pidfd_open(pid) for pid in pids]
    caller.kill()
    caller.wait(timeout=30)
    caller.stdout.close()
    left, deadline = set(watched), time.monotonic() + 30
    while left and time.monotonic() < deadline:
        left -= set(select.select(list(left), [], [], 1.0)[0])
    for descriptor in watched:
        os.close(descriptor)
    assert not left


def test_a_folder_named_rewards_where_the_command_stands_shadows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise RuntimeError('not ours')")
    (tmp_path / "mine.py").write_text("def long(item): return float(len(item.completion))")
    monkeypatch.chdir(tmp_path)
    with Isolated() as process:
        assert process.score("mine.py:long", [item("abc")])[0].value == 3.0
        assert process.score("mine:long", [item("abcd")])[0].value == 4.0
        assert process.score("rewards.length:brief", [item("")])[0].value == 1.0


def test_pictures_and_columns_arrive(process: Isolated, tmp_path: Path) -> None:
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(data, "PNG")
    shown = Item(
        Prompt("s/0", "s", "what?", (1,), (Media(data.getvalue(), (3, 2)),), False, {"level": 3}), "x", (1,), True
    )
    (tmp_path / "sees.py").write_text(
        "def ours(item): return item.images[0].getpixel((0, 0))[0] + item.columns['level'] + len(item.question)\n"
        "def trls(completions, images, level, **_): return [i[0].size[0] + one for i, one in zip(images, level)]\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': extra_info['images'][0].size[1], 'level': extra_info['level']}\n"
    )
    assert process.score(f"{tmp_path}/sees.py:ours", [shown])[0].value == 255 + 3 + 5
    assert process.score(f"{tmp_path}/sees.py:trls", [shown])[0].value == 6.0
    found = process.score(f"{tmp_path}/sees.py:compute_score", [shown])[0]
    assert (found.outcome, "answer" in found.note) == ("failed", True)  # the row has no truth to compare with
