"""Reward functions in a process of their own: what user code breaks, it breaks there, and pays with its own sample.

    caller ──socket──▶ nursery ──fork──▶ worker        both ends of one protocol are in this file
       └──────────── items, scores ────────┘

The nursery has imported what a worker needs and runs nothing else, so that the next worker after a crash or a hang is
there in milliseconds. Linux only: process file descriptors, parent-death signals, RLIMIT_DATA.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from rewards.base import Item, Reward, RewardError, evaluate, resolve
from rlhf.types import Score

PRELOADED = ("rewards.base", "rewards.answer")  # by the nursery: the latter brings math-verify, most of a second
CHUNK = 64  # items a call: small enough that a hang costs little, large enough to be cheap
KEPT = 2000  # characters of what a worker printed, for the note of a sample that ended it
START = 60.0  # seconds a nursery, or a function's module, may take to import
PLACE = struct.Struct("q")  # of the item whose turn it is, in shared memory
ALL, RESOLVING, SENT = -1, -2, -3  # instead: all at once; the function is being imported; the items are on their way
DEATH_SIGNAL, SUBREAPER = 1, 36  # PR_SET_PDEATHSIG; PR_SET_CHILD_SUBREAPER: orphans become its own children
ROUNDS = 1000  # in which what a function started, and what that started, is killed


@dataclass(frozen=True)
class Limits:
    """seconds of one call; GiB of memory that a worker may have beside what it begins with."""

    seconds: float = 30.0
    memory_gib: float = 2.0


OUT_OF_MEMORY = "MemoryError"  # in the traceback of an item that asked for more than it may have
DIED = Score("failed", note="it ended its process")


@dataclass
class Worker:
    """A worker as its caller sees it."""

    pid: int
    watch: int  # a process file descriptor: readable once the worker is dead
    line: Connection
    printed: Printed
    calls: int = 0  # that it has answered

    def end(self) -> str:
        """Kill it; what it said at last. What it started becomes the nursery's, which kills that before the next."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self.watch)
        self.line.close()
        return self.printed.close()


class Printed:
    """The end of what is written into a pipe; the rest is read and forgotten, so that nobody who prints waits."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._end = pipe, bytearray()
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while True:
            if self._stop in wait([self._pipe, self._stop]):
                return
            found = os.read(self._pipe, 1 << 16)
            if not found:
                return
            self._end = (self._end + found)[-KEPT:]

    def close(self) -> str:
        """The end of all that was written, once nobody writes any more, or somebody has held the pipe for a while."""
        self._thread.join(timeout=1)
        os.close(self._wake)
        self._thread.join(timeout=5)
        os.close(self._stop)
        os.close(self._pipe)
        return self._end.decode(errors="replace").strip()


class Isolated:
    """Scores items by functions that it finds by name, in a worker that is replaced when it dies or hangs. Use it as a
    context; one thread at a time."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.restarts = 0
        self._nursery: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._worker: Worker | None = None
        self._memory = os.memfd_create("place")
        os.ftruncate(self._memory, PLACE.size)
        self._place = mmap.mmap(self._memory, PLACE.size)

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, function: str, items: Sequence[Item], options: Mapping[str, Any] | None = None) -> list[Score]:
        """One Score an item, in order. Raises RewardError for a function that cannot be used."""
        try:
            call = function, json.dumps(dict(options or {}), sort_keys=True)
        except TypeError as error:
            raise RewardError(f"reward {function!r}: options {options}: {error}; write it as text") from error
        scores = list[Score]()
        while len(scores) < len(items):
            scores += self._some(call, items[len(scores) :])
        return scores

    def _some(self, call: tuple[str, str], items: Sequence[Item]) -> list[Score]:
        """Scores of the first of these, one at least, from one run of a worker."""
        if self._worker is not None and wait([self._worker.watch], 0):  # of what an earlier call left behind
            self._lose()
        worker = self._worker or self._start()
        self._place[:] = PLACE.pack(SENT)
        try:
            worker.line.send((*call, list(items)))
            outcome = self._heard(worker)
        except (BrokenPipeError, ConnectionResetError):
            outcome = DIED
        except BlockingIOError:  # of the line's own deadline
            outcome = Score("failed", note=f"its process has not taken what it was sent for {START:g} s")
        if not isinstance(outcome, Score):
            worker.calls += 1
            # such a worker ends itself; what follows would lack the memory that is lost
            last = next((i for i, score in enumerate(outcome) if _spent(score)), len(outcome))
            return outcome[: last + 1]
        place, printed = self._turn(), self._lose()
        if place == SENT and worker.calls:  # nobody's turn had come: it died of what earlier calls left behind
            return self._some(call, items)
        if place == SENT:  # a fresh one has only what it was sent
            place = ALL if len(items) > 1 else 0
        said = f"\nit printed: {printed}" if printed else ""
        if place == RESOLVING:
            raise RewardError(f"reward {call[0]!r}: as its module was imported, {outcome.note}{said}")
        if place == ALL and len(items) > 1:  # one call for all: who of them did it?
            return [score for item in items for score in self._some(call, [item])]
        culprit = Score(outcome.outcome, note=outcome.note + said)
        before = items[: max(place, 0)]
        return [*(self.score(call[0], before, json.loads(call[1])) if before else []), culprit]

    def _heard(self, worker: Worker) -> list[Score] | Score:
        """What the worker answers; or, as the Score of the item whose turn it is, why it does not."""
        place, begun = SENT, time.monotonic()
        while True:
            most = START if place in (SENT, RESOLVING) else self.limits.seconds
            left = begun + most - time.monotonic()
            ready = wait([worker.line, worker.watch], max(left, 0.0))
            if worker.line in ready:
                try:
                    scores, error = worker.line.recv()
                except (EOFError, ConnectionResetError):
                    return DIED
                if error is not None:
                    raise RewardError(error)
                if scores is not None:
                    return scores  # type: ignore[no-any-return]
                place, begun = self._turn(), time.monotonic()  # the function is there
                continue
            if worker.watch in ready:
                return DIED
            now = self._turn()
            if now == place:
                return Score("timed_out", note=f"it took more than {most:g} s")
            # others have had their turn meanwhile; this one's began at some time since it was looked at last
            place, begun = now, time.monotonic()

    def _lose(self) -> str:
        assert self._worker is not None
        printed = self._worker.end()
        self._worker = None
        self.restarts += 1
        return printed

    def _turn(self) -> int:
        return int(PLACE.unpack(self._place[:])[0])

    def _start(self) -> Worker:
        for last in (False, True):
            process, ours = self._nursery = self._nursery or self._opened()
            line, far_line = socket.socketpair()
            out, far_out = os.pipe()
            # whoever does not read must not hold up the caller for ever
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(START), 0))
            try:
                socket.send_fds(ours, [b"f"], [far_line.fileno(), far_out, self._memory])
                said = ours.recv(16)
                problem = f"ended with status {process.poll()}"
            except TimeoutError:
                said, problem = b"", f"has not answered for {START:g} s"
            except (BrokenPipeError, ConnectionResetError):
                said, problem = b"", f"ended with status {process.poll()}"
            finally:
                far_line.close()
                os.close(far_out)
            if said:
                pid = int(said)
                self._worker = Worker(pid, os.pidfd_open(pid), Connection(line.detach()), Printed(out))
                return self._worker
            line.close()
            os.close(out)
            self._shut()  # somebody may have ended it; a new one can be had
            if last:
                raise RuntimeError(f"the nursery of reward processes {problem}, twice; what it printed stands above")
        raise AssertionError("unreachable")

    def _opened(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """A nursery, and our end of its line."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "rewards.isolation", str(theirs.fileno()), str(self.limits.memory_gib)]
        # whose `rewards` this is; a folder of that name where the command stands must not take its place
        home = str(Path(__file__).parents[1])
        paths = [home, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env={
                **os.environ,
                **threads,
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONSAFEPATH": "1",
                "PYTHONUNBUFFERED": "1",  # what is printed before a process ends is to be seen
            },
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        ours.settimeout(START)
        return process, ours

    def _shut(self) -> None:
        """End the nursery, which ends what is left in it."""
        if self._nursery is None:
            return
        process, ours = self._nursery
        self._nursery = None
        ours.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End worker and nursery."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None
        self._shut()
        self._place.close()
        os.close(self._memory)


# -- the nursery and its workers


def nurse(line: socket.socket, memory_gib: float) -> None:
    """Fork a worker for each message, until whoever sends them is gone. The worker before, and what it has left behind
    in sessions of its own, is killed first."""
    for module in PRELOADED:
        importlib.import_module(module)
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    while True:
        message, descriptors, _, _ = socket.recv_fds(line, 1, 3)
        _end_children()
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            line.close()
            conversation, printing, place = descriptors
            work(conversation, printing, place, memory_gib)
        for descriptor in descriptors:
            os.close(descriptor)
        line.send(str(pid).encode())


def work(line: int, out: int, place: int, memory_gib: float) -> None:
    """Answer calls until the line is closed. Never returns."""
    status = 1
    try:
        os.setsid()
        libc = ctypes.CDLL(None)
        libc.prctl(DEATH_SIGNAL, signal.SIGKILL)
        libc.prctl(SUBREAPER, 1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(out)
        # counts private memory that may be written, whoever runs it, and is refused with MemoryError
        limit = _data() + int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.path.insert(0, str(Path.cwd()))  # modules of the user's, after those that are loaded
        _answer(Connection(line), mmap.mmap(place, PLACE.size))
        status = 0
    except EOFError:
        status = 0
    except BaseException:  # noqa: BLE001 - the last words of this process, for the note of its sample
        traceback.print_exc()
    finally:
        os._exit(status)


def _answer(line: Connection, place: mmap.mmap) -> None:
    rewards: dict[tuple[str, str], Reward] = {}
    mine = os.getpid()

    def now(turn: int) -> None:
        if os.getpid() != mine:  # a copy that the function forked, and that came back from it
            os._exit(0)
        place[:] = PLACE.pack(turn)

    while True:
        name, options, items = line.recv()
        scores, error = list[Score](), None
        try:
            if (name, options) not in rewards:
                now(RESOLVING)
                rewards[name, options] = resolve(name, json.loads(options))
            now(0)
            line.send((None, None))
            scores = evaluate(rewards[name, options], items, now)
        except RewardError as wrong:
            error = str(wrong)
        now(ALL)
        _end_children()
        line.send((scores, error))
        if any(map(_spent, scores)):
            os._exit(0)  # what it has kept, the next call would lack


def _spent(score: Score) -> bool:
    """Whether the function ran out of memory on it."""
    return score.outcome == "failed" and OUT_OF_MEMORY in score.note


def _end_children() -> None:
    """Kill what this process started and left, and what becomes its own as those die."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    for _ in range(ROUNDS):
        try:
            left = [int(pid) for pid in children.read_text().split()]
        except OSError:  # a kernel that does not tell
            return
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _data() -> int:
    """Bytes of private memory that may be written, of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmData"].split()[0]) * 1024


if __name__ == "__main__":
    nurse(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]))
