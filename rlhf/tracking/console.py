"""Progress on a terminal, or as plain lines in a log."""

# ruff: noqa: ARG002  a sink takes every argument of its Protocol, used or not
from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rlhf.tracking.sink import Numbers, Record, Stage

PLAIN_INTERVAL = 10.0


class Console:
    """Live bars on a terminal: the curriculum, the stage's steps with the time left, the latest numbers.

    Elsewhere plain lines: one when a stage starts, ends or reports metrics, and in between one each `interval`
    seconds, whether or not a step ended. Rollouts are never printed.
    """

    name = "console"

    def __init__(self, terminal: Terminal | None = None, interval: float = PLAIN_INTERVAL) -> None:
        self._terminal = terminal or Terminal(file=sys.stdout)
        self._live = self._terminal.is_terminal
        self._interval = interval
        self._progress: Progress | None = None
        self._stages_bar: TaskID | None = None
        self._steps_bar: TaskID | None = None
        self._started = 0.0
        self._ended = threading.Event()
        self._beat: threading.Thread | None = None
        self._lock = threading.Lock()
        self._printed = 0.0
        self._latest = ""

    def open_stage(self, stage: Stage) -> None:
        self._started = time.monotonic()
        if self._live:
            progress = self._open_bars(stage)
            done = stage.resumed or 0
            self._steps_bar = progress.add_task(stage.name, total=stage.steps, completed=done, latest="")
            return
        again = f", continuing after step {stage.resumed}" if stage.resumed is not None else ""
        self._print(f"{_heading(stage)} {stage.kind} starts{again}")
        self._latest = "waiting for its first step"
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_talking, args=(stage, self._ended), daemon=True)
        self._beat.start()

    def log(self, stage: Stage, step: int, metrics: Numbers, seconds: Numbers) -> None:
        latest = headline(metrics)
        if self._progress is not None and self._steps_bar is not None:
            self._progress.update(self._steps_bar, completed=step, latest=latest)
            return
        of = f"/{stage.steps}" if stage.steps else ""
        self._latest = f"step {step}{of}{self._left(stage, step)}  {latest}".rstrip()
        if time.monotonic() - self._printed >= self._interval or step == stage.steps:
            self._print(f"{_heading(stage)} {self._latest}")

    def rollouts(self, stage: Stage, step: int, records: Sequence[Record]) -> None:
        """Rollouts are for the report."""

    def metrics(self, stage: Stage, final: Numbers, examples: Sequence[Record]) -> None:
        self._print(f"{_heading(stage)} {headline(final)}")

    def artifact(self, stage: Stage, manifest: Record) -> None:
        if manifest.get("path"):
            self._print(f"{_heading(stage)} made {manifest['path']}")

    def close_stage(self, stage: Stage, failed: bool) -> None:
        self._ended.set()
        if self._beat is not None:
            self._beat.join(timeout=5)
            self._beat = None
        if self._progress is not None and self._steps_bar is not None:
            self._progress.remove_task(self._steps_bar)
            self._steps_bar = None
            if self._stages_bar is not None and not failed:
                self._progress.update(self._stages_bar, completed=stage.index + 1)
        word = "stopped" if failed else "done"
        spent = time.monotonic() - self._started
        budget = 60 * (stage.budget_minutes or math.inf)
        over = f", {duration(spent - budget)} over its budget" if spent > budget else ""
        self._print(f"{_heading(stage)} {word} after {duration(spent)}{over}")

    def close(self, failed: bool) -> None:
        self._ended.set()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _open_bars(self, stage: Stage) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[latest]}"),
                console=self._terminal,
            )
            self._progress.start()
            self._stages_bar = self._progress.add_task("curriculum", total=stage.total, latest="")
        if self._stages_bar is not None:
            self._progress.update(self._stages_bar, completed=stage.index)
        return self._progress

    def _keep_talking(self, stage: Stage, ended: threading.Event) -> None:
        while not ended.wait(max(self._interval / 4, 0.01)):
            if time.monotonic() - self._printed >= self._interval:
                elapsed = duration(time.monotonic() - self._started)
                self._print(f"{_heading(stage)} running for {elapsed}, {self._latest}")

    def _left(self, stage: Stage, step: int) -> str:
        done = step - (stage.resumed or 0)
        if not stage.steps or done <= 0 or step >= stage.steps:
            return ""
        return f", {duration((time.monotonic() - self._started) / done * (stage.steps - step))} left"

    def _print(self, line: str) -> None:
        with self._lock:
            self._terminal.print(line, markup=False, highlight=False, soft_wrap=True)
            self._printed = time.monotonic()


def headline(metrics: Numbers) -> str:
    """The few numbers worth a glance: loss, reward and the accuracies, three digits each, at most five.

    {"loss": 0.51234, "eval.think.accuracy": 0.875, "tokens": 9} -> "loss 0.512 · think.accuracy 0.875"
    """
    shown = []
    for word in ("loss", "reward", "accuracy", "precision", "recall"):
        for name, value in metrics.items():
            parts = name.split(".")
            if parts[-1] == word or parts[-2:] == [word, "mean"]:
                shown.append(f"{name.removeprefix('eval.')} {value:.3g}")
    return " · ".join(shown[:5])


def duration(seconds: float) -> str:
    """4 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _heading(stage: Stage) -> str:
    return f"[{stage.index + 1}/{stage.total} {stage.name}]"
