"""What a stage is given to work with, and the seeds it draws from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from rlhf.architecture import from_folder
from rlhf.batching import make_batch
from rlhf.data.rows import Rows
from rlhf.data.stream import Alike, Draw, Stream, shares
from rlhf.preemption import Preemption
from rlhf.recipe import Draws, Recipe
from rlhf.roles import Actors
from rlhf.types import Batch, Sample


class GateError(RuntimeError):
    """A stage finished and missed a gate; the message names the metric, its value and the bound."""


class StageLog(Protocol):
    """Where a stage's progress goes; `rlhf.tracking` implements it."""

    def log(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None: ...

    def rollouts(self, step: int, records: list[dict[str, Any]]) -> None: ...


@dataclass(frozen=True)
class Context:
    """One stage's world: `folder` is its own, `model` the artifact it continues, `rows` opens a data source by name;
    `preemption` says after each step whether it is the last."""

    recipe: Recipe
    folder: Path
    model: Path
    processor: Any
    actors: Actors
    rows: Callable[[str], Rows]
    log: StageLog
    preemption: Preemption = field(default_factory=Preemption)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def batch(self, samples: Sequence[Sample], index: int = 0) -> Batch:
        """The samples of optimizer step `index`, cut for the trainer's ranks."""
        resources = self.recipe.resources
        ranks, budget, pictures = resources.trainer_ranks, resources.token_budget, self.processor.image_token_id
        return make_batch(samples, ranks, budget, index, self._packed, pictures)

    @cached_property
    def _packed(self) -> bool:
        return packs(self.recipe, self.model)

    def stream(self, stage: Draws) -> Draw:
        """The stage's seeded, resumable stream over its data mix."""
        sources = {name: self.rows(name) for name in stage.data}
        weights = shares(stage.data, {name: len(rows) for name, rows in sources.items()}, stage.mix)
        kind = Stream if stage.alike is None else Alike
        return kind(sources, weights, derive(self.recipe.seed, stage.name, "data"))


def packs(recipe: Recipe, model: Path) -> bool:
    """Whether the trainer lays rows of this model end to end, which an encoder beside the decoder cannot read."""
    architecture = from_folder(model)
    return recipe.resources.packing and architecture.is_bridge and architecture.served == "vllm"


def derive(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no process, no clock)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
