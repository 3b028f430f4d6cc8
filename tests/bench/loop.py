"""The loop's own cost: seconds of the driver's processor for each group, with rollout workers that answer at once.

    python -m tests.bench.loop WORKERS GROUPS FOLDER

Everything of the driver is real (stream of rows, prompts, engine handle, scoring, packing, metrics); workers, trainer
and rewards are fakes that cost next to nothing. Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.handles import EngineHandle
from rlhf import online
from rlhf.data.rows import read
from rlhf.models import load_processor
from rlhf.recipe import Deadlines, Recipe, Rl
from rlhf.stage import Context
from rlhf.types import Batch, Group, Prompt, Rollout, Sampling, Score, StepStats
from tests.bench.workload import NATURAL, make

PROMPTS, GROUP, TOKENS = 1000, 2, 8  # of a step, of a group, of a completion


class Worker:
    """A rollout worker as a handle sees it: every group of a call comes alone, the last first."""

    def __init__(self, engine: Mapping[str, int]) -> None:
        self.version = engine
        self.stream = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._stream))

    async def _stream(self, prompts: Sequence[Prompt], sampling: Sampling, _name: str) -> AsyncIterator[Awaitable[Any]]:
        version = (self.version["now"],) * TOKENS
        rollouts = tuple(Rollout((5,) * TOKENS, (-0.5,) * TOKENS, version, "red", "stop") for _ in range(sampling.num))
        for place in reversed(range(len(prompts))):
            found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            found.set_result([(place, Group(prompts[place], prompts[place].token_ids, rollouts))])
            yield found


class Trainer:
    """Learns nothing."""

    def __init__(self, version: dict[str, int]) -> None:
        self.version = version

    async def step(self, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        return StepStats({"loss": 0.0, "tokens": float(batch.num_tokens)})

    async def publish(self, engine: Any, version: int) -> float:
        self.version["now"] = version
        return 0.0

    async def prove(self, engine: Any, version: int) -> Mapping[str, float]:
        return {}


class Rewards:
    """A group's rollouts get 0 and 1."""

    async def score(self, function: str, groups: Sequence[Group], *options: Any) -> list[list[Score]]:
        return [[Score("scored", float(i % 2)) for i in range(len(group.rollouts))] for group in groups]


def measure(workers: int, groups: int, folder: Path) -> dict[str, float]:
    """Seconds of processor time, and of the clock, for each of `groups` groups."""
    model, rows = make(NATURAL, folder)
    stage = {
        "name": "rl",
        "kind": "rl",
        "data": {"rows": 1.0},
        "steps": groups // PROMPTS,
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "max_staleness": 1,
        "checkpoint_every": 10**6,
        "rewards": {"random": {"function": "none:none"}},
    }
    recipe = Recipe.model_validate(
        {"name": "loop", "model": {"path": str(model)}, "data": {"rows": {"path": str(rows)}}, "stages": [stage]}
    )
    version = {"now": 0}
    engine = EngineHandle("policy", model, "", lambda *_: None, Deadlines(), [Worker(version) for _ in range(workers)])
    found = read(rows)
    log = SimpleNamespace(log=lambda *_: None, rollouts=lambda *_: None)
    actors: Any = SimpleNamespace(trainer=Trainer(version), rewards=Rewards())
    context = Context(recipe, folder / "loop", model, load_processor(model), actors, lambda _: found, log)
    (wanted,) = recipe.stages
    assert isinstance(wanted, Rl)
    cpu, clock = time.process_time(), time.perf_counter()
    asyncio.run(online.run(wanted, context, engine, {}))
    return {"cpu": (time.process_time() - cpu) / groups, "clock": (time.perf_counter() - clock) / groups}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
