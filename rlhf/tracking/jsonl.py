"""The run's own record, which resume and the report read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.checkpoint import write_text
from rlhf.tracking.sink import Numbers, Record, Stage


class TrackingError(RuntimeError):
    """A record of the run that cannot be continued; the message names file and line."""


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
        write_text(stage.folder / "eval.json", _dump({"metrics": _finite(final), "examples": list(examples)}) + "\n")

    def artifact(self, stage: Stage, manifest: Record) -> None:
        write_text(stage.folder / "manifest.json", _dump(manifest) + "\n")

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
    write_text(path, "".join(kept))


def _finite(numbers: Numbers) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _append(path: Path, records: Sequence[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_dump(record) + "\n" for record in records))
