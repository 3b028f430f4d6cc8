"""A run that has to go: asked to stop, it ends after the step it is in, with a checkpoint, to be continued elsewhere.

A stage that learns ends so. What saves no checkpoints (engines that start, rows being synthesised, an evaluation) ends
at once and begins anew when the run is continued. Of a grace of G seconds from being asked

    patience(G)   are for the step and its checkpoint; then it is cancelled, and continued from the checkpoint before
    the rest      for leaving: engines, Ray, wandb, the report; just before its end, `exits` ends the process
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

REQUEUE = 75  # EX_TEMPFAIL: its exit status, at which clusters start it again; also in attend.sh and slurm.sh
LEAVING_SECONDS = 30.0  # of a grace of a minute or more; half of a shorter one
LAST_SECONDS = 2.0  # of a grace of 20 s or more; a tenth of a shorter one
AGAIN_SECONDS = 5.0  # `timeout` and batch systems may send one signal twice; later, somebody means it


class PreemptedError(Exception):
    """The run was asked to stop, and ends; the message says where, and what is lost if anything is."""


@dataclass
class Preemption:
    """Whether a run was asked to stop (`asked`: by what), and how it ends then.

    grace   seconds from being asked to the end of the process
    exits   ends the process; called from another thread, and only where leaving takes too long
    task    is cancelled where nobody waits for a step, or the step takes too long
    stage   the stage that the run is in
    """

    grace: float = math.inf
    exits: Callable[[], None] | None = None
    task: asyncio.Task[Any] | None = None
    stage: str = ""
    asked: str = ""
    _since: float = 0.0
    _heeded: bool = False
    _impatient: str = ""  # why a step was not waited for
    _timers: list[threading.Timer] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()

    def withdraw(self) -> None:
        """Nobody asks any more, and nobody ends the process."""
        self.asked = ""
        self.__exit__()

    def ask(self, reason: str, grace: float = math.inf) -> None:
        """Stop, within `grace` seconds where that is less than the run has. Steps are not waited for any more when the
        same asks again, AGAIN_SECONDS later."""
        if reason == self.asked:
            if time.monotonic() > self._since + AGAIN_SECONDS:
                self._cancel("its step was not waited for when asked again")
            return
        grace = min(grace, self.grace)
        first = not self.asked
        if first:
            self.asked, self._since = reason, time.monotonic()
        if first and not self._heeded:
            self._cancel("")
        elif grace < math.inf:
            asyncio.get_running_loop().call_later(patience(grace), self._lose_patience, patience(grace))
        if self.exits is not None and grace < math.inf:
            self._timers.append(last := threading.Timer(grace - min(LAST_SECONDS, grace / 10), self.exits))
            last.daemon = True
            last.start()

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Inside, whoever works looks after each step whether the run is `asked` to stop, saves, and calls `leave`.
        Raises PreemptedError at the end if it was."""
        self._heeded = True
        try:
            yield
        finally:
            self._heeded = False
        if self.asked:
            raise PreemptedError(f"preempted ({self.asked}) after the last step of stage {self.stage!r}")

    def leave(self, step: int, but: str = "") -> None:
        """End the run if it was asked to: what was done until `step` is saved, `but` for something. Raises
        PreemptedError."""
        if self.asked:
            raise PreemptedError(f"preempted ({self.asked}) at step {step} of stage {self.stage!r}{but}")

    @property
    def cancelled(self) -> str:
        """What to say of a run that was cancelled."""
        if self._impatient:
            return self.lost(self._impatient)
        return f"preempted ({self.asked}) {f'in stage {self.stage!r}' if self.stage else 'before its first stage'}"

    def lost(self, why: str) -> str:
        """What to say of a run that could not save its step."""
        return f"preempted ({self.asked}) in stage {self.stage!r}: {why}, so what it did since its last save is lost"

    def _lose_patience(self, waited: float) -> None:
        if self._heeded:
            self._cancel(f"its step did not end within {waited:.0f} s")

    def _cancel(self, impatient: str) -> None:
        assert self.task is not None
        self._impatient = impatient if self._heeded else ""
        self.task.cancel()


def patience(grace: float) -> float:
    """Of a grace, the seconds for which a step and its checkpoint are waited for."""
    return grace - min(LEAVING_SECONDS, grace / 2)
