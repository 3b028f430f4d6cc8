"""What a stage is given to work with, and the seeds it draws from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.data.rows import Rows
from rlhf.data.stream import Stream
from rlhf.recipe import Recipe
from rlhf.roles import Actors


class StageLog(Protocol):
    """Where a stage's progress goes; `rlhf.tracking` implements it."""

    def log(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None: ...

    def rollouts(self, step: int, records: list[dict[str, Any]]) -> None: ...


@dataclass(frozen=True)
class Context:
    """One stage's world: `folder` is its own, `model` the artifact it continues, `rows` opens a data source by name."""

    recipe: Recipe
    folder: Path
    model: Path
    processor: Any
    actors: Actors
    rows: Callable[[str], Rows]
    log: StageLog

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def stream(self, weights: Mapping[str, float], stage: str) -> Stream:
        """The stage's seeded, resumable stream over its data mix."""
        return Stream({name: self.rows(name) for name in weights}, weights, derive(self.recipe.seed, stage, "data"))


def derive(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no process, no clock)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
