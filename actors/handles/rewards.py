"""Reward workers, and reward models in processes of their own."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.handles.calls import LOST, answered, reason, within
from rewards.base import Item, items_of
from rewards.isolation import CHUNK, START
from rlhf.recipe import Deadlines
from rlhf.types import Group, Score

SCALAR_CHUNK, LIVES = 8, 3  # groups a call of a reward model; how often one may be lost over a call


@dataclass
class ScalarHandle:
    """A reward model in a process of its own. One that died or hangs is started again from its artifact, and asked
    again."""

    name: str
    start: Callable[[], Any]
    deadlines: Deadlines
    worker: Any
    restarts: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # a deadline must not count the time of other calls

    async def ready(self) -> None:
        what = f"reward model {self.name!r} starting"
        await within(self.deadlines.start, "start", what, self.worker.__ray_ready__.remote())

    async def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Raises RuntimeError when it is lost three times over one call of SCALAR_CHUNK groups."""
        scores = list[list[Score]]()
        for start in range(0, len(groups), SCALAR_CHUNK):  # the deadline is one call's, whatever waits
            async with self.turn:
                scores += await self._some(groups[start : start + SCALAR_CHUNK])
        return scores

    async def _some(self, groups: Sequence[Group]) -> list[list[Score]]:
        what, lost = f"reward model {self.name!r} scoring {len(groups)} groups", list[BaseException]()
        while len(lost) < LIVES:
            try:
                if lost:
                    await self._restart()
                scores: list[list[Score]] = await within(
                    self.deadlines.generate, "generate", what, self.worker.score.remote(groups)
                )
                return scores
            except LOST as error:
                lost.append(error)
        raise RuntimeError(
            f"reward model {self.name!r} was lost {LIVES} times over one call, last: {reason(lost[-1])}"
        ) from lost[-1]

    async def _restart(self) -> None:
        self.restarts += 1
        ray.kill(self.worker)  # it may hang, and hold its memory
        self.worker = self.start()
        await self.ready()


@dataclass
class RewardsHandle:
    """Reward workers, each with a process that runs the functions (`rewards.isolation`), and reward models."""

    start: Callable[[int], Any]
    deadlines: Deadlines
    workers: list[Any] = field(default_factory=list)
    scalars: dict[str, ScalarHandle] = field(default_factory=dict)  # those that are scoring
    locks: defaultdict[int, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def score(
        self, function: str, groups: Sequence[Group], options: Mapping[str, Any] | None = None
    ) -> list[list[Score]]:
        items = [item for group in groups for item in items_of(group)]
        chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
        queues = [chunks[worker :: len(self.workers)] for worker in range(len(self.workers))]
        done = await asyncio.gather(
            *(self._work(worker, function, queue, options or {}) for worker, queue in enumerate(queues))
        )
        scores: list[list[Score]] = [[] for _ in chunks]
        for worker, results in enumerate(done):
            scores[worker :: len(self.workers)] = results
        flat = itertools.chain.from_iterable(scores)
        return [[next(flat) for _ in group.rollouts] for group in groups]

    async def scalar(self, model: str, groups: Sequence[Group]) -> list[list[Score]]:
        return await self.scalars[model].score(groups)

    async def _work(
        self, worker: int, function: str, queue: list[list[Item]], options: Mapping[str, Any]
    ) -> list[list[Score]]:
        return [await self._chunk(worker, function, chunk, options) for chunk in queue]

    async def _chunk(self, worker: int, function: str, items: list[Item], options: Mapping[str, Any]) -> list[Score]:
        """Score a chunk. What a function does to its own process costs one sample (`rewards.isolation`); a worker that
        itself dies, or is silent for longer than all samples together may take, is replaced and asked once more."""
        longest = (self.deadlines.reward + START) * (len(items) + 1) + self.deadlines.start
        for last in (False, True):
            # one chunk at a time: a deadline must not count the time another function takes, nor kill its process
            async with self.locks[worker]:
                try:
                    call = self.workers[worker].score.remote(function, items, options)
                    scores: list[Score] = await asyncio.wait_for(answered(call), longest)
                    return scores
                except TimeoutError:
                    failure = Score("timed_out", note=f"reward worker {worker} has not answered for {longest:g} s")
                except RayActorError as error:
                    failure = Score("failed", note=f"reward worker {worker} died: {reason(error)}")
                ray.kill(self.workers[worker])
                self.workers[worker] = self.start(worker)
                ready = self.workers[worker].__ray_ready__.remote()
                await within(self.deadlines.start, "start", f"reward worker {worker} starting again", ready)
            if last:
                break
        return [failure] * len(items)
