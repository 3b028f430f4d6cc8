"""What the places that progress goes to have in common."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

Numbers = Mapping[str, float]
Record = Mapping[str, Any]


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
