"""A model on its rollout workers."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import ray

from actors.artifacts import read_probes
from actors.handles.calls import LOST, TrainerLostError, reason, within
from rlhf.agreement import compare
from rlhf.architecture import base_of
from rlhf.recipe import Deadlines
from rlhf.roles import SyncError
from rlhf.types import Group, Probe, ProbeScores, Prompt, Sampling

T = TypeVar("T")

CALLS = 24  # streams a worker answers at once; further ones wait here
SCORED = 64  # sequences that a worker scores in one call


def _calls() -> asyncio.Semaphore:
    return asyncio.Semaphore(CALLS)


async def _next_of(call: Any) -> Any:
    """The next value of a streaming call."""
    return await (await anext(call))


class Loads:
    """How many prompts each worker has been asked and has not answered; which has the fewest, in time that hardly grows
    with their number."""

    def __init__(self, workers: int) -> None:
        self._loads = [0] * workers
        self._heap = [(0, index) for index in range(workers)]  # with entries of before, left out when they come up

    def add(self) -> int:
        """One prompt more, for the worker with the fewest; the first of several."""
        load, index = heapq.heappop(self._heap)
        while load != self._loads[index]:
            load, index = heapq.heappop(self._heap)
        self._set(index, load + 1)
        return index

    def remove(self, index: int, prompts: int = 1) -> None:
        """Of this worker so many prompts fewer."""
        if prompts:
            self._set(index, self._loads[index] - prompts)

    def total(self) -> int:
        return sum(self._loads)

    def _set(self, index: int, load: int) -> None:
        self._loads[index] = load
        heapq.heappush(self._heap, (load, index))
        if len(self._heap) > 64 + 4 * len(self._loads):
            self._heap = [(load, index) for index, load in enumerate(self._loads)]
            heapq.heapify(self._heap)


@dataclass
class EngineHandle:
    """One model on its rollout workers. One that died, hangs or lost its engine is started again, refitted, and its
    prompts are asked again."""

    name: str
    folder: Path
    architecture: str
    start: Callable[[int, Path], Any]
    deadlines: Deadlines
    workers: list[Any] = field(default_factory=list)
    refit: Callable[[Any], Awaitable[None]] | None = None
    expected: tuple[Sequence[Probe], ProbeScores] | None = None  # what the weights it was given last compute
    sleeps: bool = False  # it shares GPUs with the trainer
    asleep: bool = False
    restarts: int = 0
    restarting: asyncio.Lock = field(default_factory=asyncio.Lock)
    waking: asyncio.Lock = field(default_factory=asyncio.Lock)
    calls: defaultdict[int, asyncio.Semaphore] = field(default_factory=lambda: defaultdict(_calls))

    @cached_property
    def waiting(self) -> Loads:
        return Loads(len(self.workers))

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample every prompt; the groups in the order of the prompts."""
        async with aclosing(self.stream(prompts, sampling)) as found:
            groups = {place: group async for place, group in found}
        return [groups[place] for place in range(len(prompts))]

    async def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[tuple[int, Group]]:
        """Sample on every worker at once; (place among the prompts, group) as they are finished. A prompt goes to the
        worker that has the fewest."""
        await self._wake()
        shares: defaultdict[int, list[int]] = defaultdict(list)
        for place in range(len(prompts)):
            shares[self.waiting.add()].append(place)
        found: asyncio.Queue[tuple[int, Group] | Exception] = asyncio.Queue()
        asking = [
            asyncio.create_task(self._ask(worker, {place: prompts[place] for place in places}, sampling, found))
            for worker, places in shares.items()
        ]
        try:
            for _ in prompts:
                item = await found.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def sleep(self) -> None:
        """Give up the GPU's memory until something is asked; an engine with a GPU of its own keeps it."""
        async with self.waking:
            if self.sleeps and not self.asleep:
                await self._every("sleep", "going to sleep")
                self.asleep = True

    async def _wake(self) -> None:
        async with self.waking:  # who comes meanwhile waits, too
            if self.asleep:
                await self._every("wake", "waking up")
                self.asleep = False

    async def _every(self, method: str, doing: str) -> None:
        async def ask(worker: Any) -> None:
            what = f"engine {self.name!r} {doing}"
            await within(self.deadlines.sync, "sync", what, getattr(worker, method).remote())

        await asyncio.gather(*(self._call(index, ask) for index in range(len(self.workers))))

    def dismiss(self) -> None:
        """End every worker."""
        for worker in self.workers:
            ray.kill(worker)

    async def load(self, publish: Callable[[], Awaitable[Callable[[Any], Awaitable[None]]]]) -> None:
        """Publish weights, give them to every worker by what that returns, and keep it for workers that have to be
        started again."""
        async with self.restarting:  # one that is being started takes the weights of before, which this writes over
            self.refit, self.expected = await publish(), None
        await self._refit_all()

    async def open(self, folder: Path) -> None:
        """Give every worker an artifact's weights, proven by the probe scores that lie beside them."""
        async with self.restarting:
            self.refit, self.expected = partial(self._open, folder), None
        await self._refit_all()
        self.folder = folder
        await self.prove_artifact()

    async def _open(self, folder: Path, worker: Any) -> None:
        call = worker.open.remote(str(folder), 0)
        await within(self.deadlines.sync, "sync", f"engine {self.name!r} loading {folder}", call)

    async def prove_artifact(self) -> None:
        """Check the engine's live log-probs against the artifact's probe scores, where it has any."""
        self.expected = read_probes(self.folder)
        if self.expected is None:
            return
        for scores in await self.score(self.expected[0]):
            self._require_agreement(scores, f"{self.folder} holds")

    def _require_agreement(self, scores: ProbeScores, what: str) -> None:
        assert self.expected is not None
        agreement = compare(self.expected[1], scores)
        if not agreement.ok:
            raise SyncError(f"engine {self.name!r} does not compute what {what}: {agreement.message}")

    async def score(self, probes: Sequence[Probe]) -> list[ProbeScores]:
        """Every worker's live log-probs on the probes."""
        await self._wake()
        indices = range(len(self.workers))
        return list(await asyncio.gather(*(self._call(i, lambda w: self._score_on(w, probes)) for i in indices)))

    async def likelihoods(self, probes: Sequence[Probe]) -> list[tuple[float, ...]]:
        """Log-probs of each sequence's tokens from its second on, the sequences dealt out to all workers."""
        await self._wake()
        found: dict[int, tuple[float, ...]] = {}

        async def ask(index: int) -> None:
            mine = range(index, len(probes), len(self.workers))
            for start in range(0, len(mine), SCORED):
                places = mine[start : start + SCORED]
                part = [probes[place] for place in places]
                scores = await self._call(index, partial(self._score_on, probes=part, key="generate"))
                found.update(zip(places, scores.logprobs, strict=True))

        await asyncio.gather(*(ask(index) for index in range(len(self.workers))))
        return [found[place] for place in range(len(probes))]

    async def _score_on(self, worker: Any, probes: Sequence[Probe], key: str = "sync") -> ProbeScores:
        call, limit = worker.score.remote(probes), getattr(self.deadlines, key)
        found: ProbeScores = await within(limit, key, f"engine {self.name!r} scoring sequences", call)
        return found

    async def fingerprints(self, probes: Sequence[Probe]) -> Any:
        """What the first worker's modules compute on the probes, for naming a parameter group that is wrong."""
        await self._wake()
        call = self.workers[0].fingerprints.remote(probes)
        return await within(self.deadlines.sync, "sync", f"engine {self.name!r} fingerprints", call)

    async def _refit_all(self) -> None:
        assert self.refit is not None
        await self._wake()
        for index, worker in enumerate(self.workers):
            try:
                await self.refit(worker)
            except TrainerLostError:
                raise
            except LOST:
                await self._restart(index, worker)

    async def _ask(self, index: int, prompts: dict[int, Prompt], sampling: Sampling, found: asyncio.Queue[Any]) -> None:
        """Put a worker's groups into `found` as they come, or what went wrong; when it is lost, its replacement is
        asked for the rest."""

        asked: list[tuple[Any, str]] = []

        async def ask(worker: Any) -> None:
            places = list(prompts)
            what = f"engine {self.name!r} generating for {len(places)} prompts"
            asked.append((worker, name := uuid4().hex))
            call = worker.stream.options(num_returns="streaming").remote(list(prompts.values()), sampling, name)
            while prompts:
                for place, group in await within(self.deadlines.generate, "generate", what, _next_of(call)):
                    del prompts[places[place]]
                    self.waiting.remove(index)
                    found.put_nowait((places[place], group))

        try:
            async with self.calls[index]:
                await self._call(index, ask)
        except asyncio.CancelledError:
            if asked:  # nobody waits for these replies any more
                worker, name = asked[-1]
                worker.abort.remote(name)
            raise
        except Exception as error:  # noqa: BLE001 - handed to whoever takes the groups
            found.put_nowait(error)
        finally:
            self.waiting.remove(index, len(prompts))

    async def _call(self, index: int, call: Callable[[Any], Awaitable[T]]) -> T:
        """What a worker answers; one that is lost is replaced and its replacement asked, twice at most."""
        for attempt in itertools.count():
            worker = self.workers[index]
            try:
                return await call(worker)
            except TrainerLostError:
                raise
            except LOST as error:
                if attempt == 2:
                    raise RuntimeError(
                        f"engine {self.name!r}: its worker {index} was lost three times over one call, last: "
                        f"{reason(error)}"
                    ) from error
                await self._restart(index, worker)
        raise AssertionError("unreachable")

    async def _restart(self, index: int, dead: Any) -> None:
        """Replace a lost worker, once, however many calls it took with it."""
        async with self.restarting:
            if self.workers[index] is not dead:
                return
            self.restarts += 1
            ray.kill(dead)  # it may hang, and hold its memory
            worker = self.start(index, base_of(self.folder))
            what = f"engine {self.name!r} starting again"
            await within(self.deadlines.start, "start", what, worker.heartbeat.remote())
            if self.refit is not None:
                await self.refit(worker)
            if self.expected is not None:
                self._require_agreement(await self._score_on(worker, self.expected[0]), "it was given")
            self.workers[index] = worker
