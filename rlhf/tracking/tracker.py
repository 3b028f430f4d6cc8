"""Hands the progress of a run to its record and to everything that shows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from rlhf.recipe import Tracking
from rlhf.tracking.console import Console
from rlhf.tracking.jsonl import Jsonl
from rlhf.tracking.sink import Numbers, Record, Sink, Stage, stage_folder
from rlhf.tracking.tensorboard import TensorBoard
from rlhf.tracking.wandb import Wandb


class Tracker(AbstractContextManager["Tracker"]):
    """Hands progress to every sink. Use as a context manager: leaving it closes the sinks, on an error too.

    sinks replaces the choice of `settings`; a Jsonl writer always comes first.
    """

    def __init__(
        self, run_folder: Path, name: str, settings: Tracking | None = None, sinks: Sequence[Sink] | None = None
    ) -> None:
        self.run_folder = run_folder
        self._record = Jsonl()
        self._views = list(sinks) if sinks is not None else _views(run_folder, name, settings or Tracking())

    def stage(
        self,
        name: str,
        kind: str,
        index: int,
        total: int,
        *,
        steps: int | None = None,
        resumed: int | None = None,
        budget_minutes: float | None = None,
    ) -> StageLog:
        """The log of one stage, a context manager. Its folder is `stages/NN-name`.

        resumed: the last step that is already in the checkpoint; later records are removed, so none is doubled.
        """
        folder = stage_folder(self.run_folder, index, name)
        return StageLog(self, Stage(name, kind, index, total, folder, steps, resumed, budget_minutes))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for view in list(self._views):
            self._guard(view, lambda view=view: view.close(error is not None))  # type: ignore[misc]

    def _each(self, call: Callable[[Sink], None]) -> None:
        call(self._record)
        for view in list(self._views):
            self._guard(view, lambda view=view: call(view))  # type: ignore[misc]

    def _guard(self, view: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        # A view may be anything from a broken pipe to a refused connection: none of it is worth a training run.
        except Exception as error:  # noqa: BLE001
            if view in self._views:
                self._views.remove(view)
                # what it holds open (a thread, a service process) must not outlive it
                self._guard(view, lambda: view.close(True))
            warnings.warn(
                f"{view.name} tracking failed and is off for the rest of this run "
                f"({type(error).__name__}: {error}); the record goes on in {self.run_folder}",
                stacklevel=2,
            )


class StageLog(AbstractContextManager["StageLog"]):
    """What a loop writes to. Steps grow: those of a loop that trains count from 1."""

    def __init__(self, tracker: Tracker, stage: Stage) -> None:
        self._tracker = tracker
        self._stage = stage

    @property
    def folder(self) -> Path:
        return self._stage.folder

    def log(self, step: int, metrics: Numbers, seconds: Numbers) -> None:
        """One step: flat metric names to numbers, and where its seconds went (rollout, reward, train, sync, …)."""
        self._tracker._each(lambda sink: sink.log(self._stage, step, metrics, seconds))

    def rollouts(self, step: int, records: Iterable[Record]) -> None:
        """Sampled rollouts of a step, as the report and the tables show them; see `record_image` for the image."""
        kept = list(records)
        self._tracker._each(lambda sink: sink.rollouts(self._stage, step, kept))

    def metrics(self, final: Numbers, examples: Iterable[Record] = ()) -> None:
        """The stage's final metrics and the evaluated examples behind them."""
        kept = list(examples)
        self._tracker._each(lambda sink: sink.metrics(self._stage, final, kept))

    def artifact(self, manifest: Record) -> None:
        """What the stage made: path, digest, parent, recipe_digest, data_digest."""
        self._tracker._each(lambda sink: sink.artifact(self._stage, manifest))

    def __enter__(self) -> Self:
        self._tracker._each(lambda sink: sink.open_stage(self._stage))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker._each(lambda sink: sink.close_stage(self._stage, error is not None))


def _views(run_folder: Path, name: str, settings: Tracking) -> list[Sink]:
    views: list[Sink] = [Console()]
    if settings.tensorboard:
        views.append(TensorBoard(run_folder))
    if settings.wandb:
        views.append(Wandb(run_folder, name, settings.project))
    return views
