"""Curves, rollout tables and artifacts in Weights & Biases."""

from __future__ import annotations

import base64
import io
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rlhf.checkpoint import write_text
from rlhf.tracking.sink import Numbers, Record, Stage

WANDB_START_DEADLINE = 60.0
WANDB_FINISH_DEADLINE = 120.0


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
            write_text(path, uuid.uuid4().hex[:12] + "\n")
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
