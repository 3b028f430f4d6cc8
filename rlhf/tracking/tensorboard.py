"""Scalars and texts in TensorBoard's files."""

# ruff: noqa: ARG002  a sink takes every argument of its Protocol, used or not
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.tracking.sink import Numbers, Record, Stage


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
