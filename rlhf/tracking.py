"""Where progress goes: the console, JSONL beside the run, TensorBoard and wandb.

    with Tracker(run_folder, recipe.name, recipe.tracking) as tracker:
        with tracker.stage("long-cot", "sft", index=5, total=13, steps=300, resumed=120) as stage:
            stage.log(121, {"loss": 0.7}, {"train": 0.4})
            stage.rollouts(121, records)
            stage.metrics({"eval.think.accuracy": 0.61}, examples)

JSONL is the run's own record: resume and the report read it, so its failure stops the run. Every other sink is a
view. A view that fails is switched off with one warning naming it and training goes on; nothing it would have shown
is lost, because JSONL has it.
"""

# ruff: noqa: ARG002  a sink takes every argument of its Protocol, used or not
from __future__ import annotations

import base64
import io
import json
import math
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from PIL import Image
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rlhf.recipe import Tracking

Numbers = Mapping[str, float]
Record = Mapping[str, Any]

PLAIN_INTERVAL = 10.0
WANDB_START_DEADLINE = 60.0
WANDB_FINISH_DEADLINE = 120.0


class TrackingError(RuntimeError):
    """A record of the run that cannot be continued; the message names file and line."""


@dataclass(frozen=True)
class Stage:
    """One stage as the sinks see it.

    index    0-based position among `total` stages
    folder   where its files lie
    steps    how many steps it will take, if known
    resumed  the last step already done, None when it starts afresh
    budget_minutes  how long it should take, if that is known
    """

    name: str
    kind: str
    index: int
    total: int
    folder: Path
    steps: int | None = None
    resumed: int | None = None
    budget_minutes: float | None = None


class Sink(Protocol):
    """One place progress goes to. Calls come from one thread, in order: open, any of the middle four, close_stage."""

    name: str

    def open_stage(self, stage: Stage) -> None: ...

    def log(self, stage: Stage, step: int, metrics: Numbers, seconds: Numbers) -> None: ...

    def rollouts(self, stage: Stage, step: int, records: Sequence[Record]) -> None: ...

    def metrics(self, stage: Stage, final: Numbers, examples: Sequence[Record]) -> None: ...

    def artifact(self, stage: Stage, manifest: Record) -> None: ...

    def close_stage(self, stage: Stage, failed: bool) -> None: ...

    def close(self, failed: bool) -> None: ...


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
    """What a loop writes to. Steps count from 1 and grow."""

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


def stage_folder(run_folder: Path, index: int, name: str) -> Path:
    """`stages/NN-name`, NN counting from 01."""
    return run_folder / "stages" / f"{index + 1:02d}-{name}"


def record_image(data: bytes, size: tuple[int, int], limit: int = 384) -> str:
    """An encoded image as a PNG data URI for a rollout record, shrunk until no side exceeds `limit` pixels.

    size is (width, height). A small PNG passes through byte for byte.
    """
    if max(size) > limit or not data.startswith(b"\x89PNG"):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((limit, limit))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Jsonl:
    """Append-only files in the stage's folder: steps.jsonl, rollouts.jsonl, eval.json and manifest.json.

    Every line is flushed before the call returns. Numbers that are not finite are written as null.
    """

    name = "JSONL"

    def open_stage(self, stage: Stage) -> None:
        stage.folder.mkdir(parents=True, exist_ok=True)
        for file in ("steps.jsonl", "rollouts.jsonl"):
            keep_until(stage.folder / file, stage.resumed)

    def log(self, stage: Stage, step: int, metrics: Numbers, seconds: Numbers) -> None:
        line = {"step": step, "time": time.time(), "seconds": _finite(seconds), "metrics": _finite(metrics)}
        _append(stage.folder / "steps.jsonl", [line])

    def rollouts(self, stage: Stage, step: int, records: Sequence[Record]) -> None:
        _append(stage.folder / "rollouts.jsonl", [{**record, "step": step} for record in records])

    def metrics(self, stage: Stage, final: Numbers, examples: Sequence[Record]) -> None:
        _replace(stage.folder / "eval.json", _dump({"metrics": _finite(final), "examples": list(examples)}) + "\n")

    def artifact(self, stage: Stage, manifest: Record) -> None:
        _replace(stage.folder / "manifest.json", _dump(manifest) + "\n")

    def close_stage(self, stage: Stage, failed: bool) -> None:
        """Nothing is held open between lines."""

    def close(self, failed: bool) -> None:
        """Nothing is held open between lines."""


def keep_until(path: Path, step: int | None) -> None:
    """Drop the records after `step` from a JSONL file, all of them if None. Atomic; a missing file stays missing.

    A last line without its newline was cut by a kill and is dropped. Any other broken line raises TrackingError.
    """
    if not path.exists():
        return
    kept = []
    if step is not None:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                recorded = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise TrackingError(
                    f"{path}:{number}: not a record with a step; repair or remove that line, then run again"
                ) from error
            if recorded <= step:
                kept.append(line + "\n")
    _replace(path, "".join(kept))


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
        word = "stopped by an error" if failed else "done"
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


class TensorBoard:
    """Scalars under `STAGE/metric`, times under `STAGE/seconds/…`, in `tensorboard/` of the run."""

    name = "TensorBoard"

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / "tensorboard"
        self._writer: Any = None

    def open_stage(self, stage: Stage) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        # One writer a stage: purge_step hides what a killed process wrote after the checkpoint, in this stage only.
        purge = None if stage.resumed is None else stage.resumed + 1
        self._writer = SummaryWriter(str(self._folder / stage.folder.name), purge_step=purge)

    def log(self, stage: Stage, step: int, metrics: Numbers, seconds: Numbers) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for name, value in seconds.items():
            self._writer.add_scalar(f"seconds/{name}", value, step)

    def rollouts(self, stage: Stage, step: int, records: Sequence[Record]) -> None:
        for number, record in enumerate(records):
            completion = str(record.get("completion", "")).replace("\n", "\n    ")
            self._writer.add_text(f"rollouts/{number}", f"**{record.get('question', '')}**\n\n    {completion}", step)

    def metrics(self, stage: Stage, final: Numbers, examples: Sequence[Record]) -> None:
        for name, value in final.items():
            self._writer.add_scalar(f"final/{name}", value, 0)

    def artifact(self, stage: Stage, manifest: Record) -> None:
        self._writer.add_text("artifact", "\n\n".join(f"{key}: {value}" for key, value in manifest.items()), 0)

    def close_stage(self, stage: Stage, failed: bool) -> None:
        self.close(failed)

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Wandb:
    """One wandb run per run folder: metrics as `STAGE/metric` over `STAGE/step`, rollouts as tables with images,
    artifacts with their lineage in the metadata.

    WANDB_MODE is obeyed; without it the run is online if this user is logged in, else offline. The run's id is kept
    in `wandb_id` beside the run, so a resumed run continues the same one. Closing ends wandb's service process.
    """

    name = "wandb"

    def __init__(self, run_folder: Path, name: str, project: str) -> None:
        self._folder = run_folder
        self._name = name
        self._project = project
        self._run: Any = None

    def open_stage(self, stage: Stage) -> None:
        run = self._start()
        run.define_metric(f"{stage.name}/step", hidden=True)
        run.define_metric(f"{stage.name}/*", step_metric=f"{stage.name}/step")

    def log(self, stage: Stage, step: int, metrics: Numbers, seconds: Numbers) -> None:
        values = {f"{stage.name}/{name}": value for name, value in metrics.items()}
        values |= {f"{stage.name}/seconds/{name}": value for name, value in seconds.items()}
        self._run.log({f"{stage.name}/step": step, **values})

    def rollouts(self, stage: Stage, step: int, records: Sequence[Record]) -> None:
        if records:
            self._run.log({f"{stage.name}/step": step, f"{stage.name}/rollouts": self._table(records)})

    def metrics(self, stage: Stage, final: Numbers, examples: Sequence[Record]) -> None:
        self._run.summary.update({f"{stage.name}/final/{name}": value for name, value in final.items()})
        if examples:
            self._run.log({f"{stage.name}/examples": self._table(examples)})

    def artifact(self, stage: Stage, manifest: Record) -> None:
        import wandb

        made = wandb.Artifact(f"{self._run.id}-{stage.name}", type=stage.kind, metadata=dict(manifest))
        folder = self._folder / str(manifest["path"])
        if manifest["path"] and folder.exists():
            # a reference, not an upload: weights stay where the run put them
            made.add_reference(folder.absolute().as_uri(), checksum=False)
        self._run.log_artifact(made)

    def close_stage(self, stage: Stage, failed: bool) -> None:
        """The wandb run spans the stages."""

    def close(self, failed: bool) -> None:
        if self._run is None:
            return
        import wandb

        run, self._run = self._run, None

        def finish() -> None:
            try:
                run.finish(exit_code=int(failed))
            finally:
                wandb.teardown(exit_code=int(failed))

        _within(WANDB_FINISH_DEADLINE, finish, "finishing the wandb run")

    def _start(self) -> Any:
        if self._run is None:
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
            self._folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=self._project,
                name=self._name,
                id=self._id(),
                dir=str(self._folder),
                mode=mode,  # type: ignore[arg-type]
                # offline runs are joined by their id when they are synced
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, save_code=False, init_timeout=WANDB_START_DEADLINE
                ),
            )
        return self._run

    def _id(self) -> str:
        path = self._folder / "wandb_id"
        if not path.exists():
            _replace(path, uuid.uuid4().hex[:12] + "\n")
        return path.read_text().strip()

    def _table(self, records: Sequence[Record]) -> Any:
        import wandb

        columns = ["key", "question", "image", "completion", "answer", "value", "outcome", "verdict", "note"]
        table = wandb.Table(columns=columns)
        for record in records:
            image = record.get("image")
            shown = wandb.Image(_decode(image)) if image else None
            table.add_data(*(shown if column == "image" else _cell(record.get(column)) for column in columns))
        return table


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


def _views(run_folder: Path, name: str, settings: Tracking) -> list[Sink]:
    views: list[Sink] = [Console()]
    if settings.tensorboard:
        views.append(TensorBoard(run_folder))
    if settings.wandb:
        views.append(Wandb(run_folder, name, settings.project))
    return views


def _heading(stage: Stage) -> str:
    return f"[{stage.index + 1}/{stage.total} {stage.name}]"


def _finite(numbers: Numbers) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _append(path: Path, records: Sequence[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_dump(record) + "\n" for record in records))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, float) else str(value)


def _within(deadline: float, call: Callable[[], None], what: str) -> None:
    """Run a call that may hang. Raises TimeoutError naming it after `deadline` seconds, and what the call raised."""
    raised: list[Exception] = []

    def guarded() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  raised again by the caller's thread
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(deadline)
    if thread.is_alive():
        raise TimeoutError(f"{what} took longer than {deadline:g} s")
    if raised:
        raise raised[0]
