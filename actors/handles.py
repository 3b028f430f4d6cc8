"""What a loop holds of its actors: roles of `rlhf.roles`, with a deadline for every remote call.

A handle owns the liveness of its actors: a rollout or reward worker that dies or hangs is replaced here.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import RayActorError

from actors.artifacts import read_probes, write_probes
from rewards.base import Item, items_of
from rewards.isolation import CHUNK, START
from rlhf.agreement import Agreement, compare, localise
from rlhf.architecture import base_of
from rlhf.recipe import Deadlines
from rlhf.roles import ActorLostError, SyncError
from rlhf.tasks import under_way
from rlhf.types import Batch, Fit, Group, Probe, ProbeScores, Prompt, Publication, Sampling, Score, StepStats, TrainSpec

T = TypeVar("T")

SCALAR_CHUNK, LIVES = 8, 3  # groups a call of a reward model; how often one may be lost over a call
CALLS = 24  # streams a worker answers at once; further ones wait here
GRACE_SECONDS = 10.0  # for Ray's word that a rank died, after other ranks lost their connection to it


class ActorTimeoutError(TimeoutError):
    """A remote call missed its deadline; names the actor, the call and the recipe key of the deadline."""


class TrainerLostError(ActorLostError):
    """The trainer died while a worker took weights from it: nothing is wrong with the worker."""


# a worker of which one of these was heard is of no use any more: its process, its engine or its answer is gone
LOST = (RayActorError, ActorLostError, ActorTimeoutError)


def _calls() -> asyncio.Semaphore:
    return asyncio.Semaphore(CALLS)


def reason(error: BaseException) -> str:
    """Why an actor died, in a line: Ray tells in its first that it died, and in its last why."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


async def within(seconds: float, deadline: str, what: str, reference: Any) -> Any:
    """Await a remote call for at most `seconds`; `deadline` is its key in the recipe's [deadlines]."""
    try:
        return await asyncio.wait_for(_future(reference), seconds)
    except TimeoutError as error:
        raise ActorTimeoutError(
            f"{what} did not answer within {seconds:g} s; raise deadlines.{deadline} if it is only slow"
        ) from error


async def _future(reference: Any) -> Any:
    return await reference


async def _next_of(call: Any) -> Any:
    """The next value of a streaming call."""
    return await (await anext(call))


SCORED = 64  # sequences that a worker scores in one call


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


@dataclass
class TrainerHandle:
    """All ranks of the trainer, called together."""

    ranks: list[Any]
    deadlines: Deadlines
    transport: str = "cpu"  # of what is published
    line_size: int = 2  # processes of a line: the rank that sends, and those of an engine
    probes: Sequence[Probe] = ()
    lines: dict[tuple[Any, Any], str] = field(default_factory=dict)  # of a rank and a worker
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # a rank does one thing after another

    async def begin(self, spec: TrainSpec, probes: Sequence[Probe]) -> Mapping[str, float]:
        self.probes = probes
        info = (await self._all("begin", "start", spec))[0]
        return {"parameters": info.num_parameters, "trainable": info.num_trainable}

    async def step(self, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        stats: StepStats = (await self._all("step", "step", ray.put(batch), fresh, alone))[0]
        return stats

    async def losses(self, batch: Batch) -> Mapping[str, Fit]:
        return await self._by_key("losses", batch)

    async def divergences(self, batch: Batch, estimator: str) -> Mapping[str, float]:
        return await self._by_key("divergences", batch, estimator)

    async def logprobs(self, batch: Batch) -> Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        return await self._by_key("logprobs", batch)

    async def values(self, batch: Batch, alone: bool = True) -> Mapping[str, tuple[float, ...]]:
        return await self._by_key("values", batch, alone)

    async def rewards(self, batch: Batch) -> Mapping[str, float]:
        return await self._by_key("rewards", batch)

    async def publish(self, engine: EngineHandle, version: int) -> float:  # type: ignore[override]
        started = time.perf_counter()
        await engine.load(partial(self._published, engine.name, version))
        return time.perf_counter() - started

    async def _published(self, engine: str, version: int) -> Callable[[Any], Awaitable[None]]:
        """How a worker of the engine gets what is published now, for as long as nothing else is."""
        first, *others = await self._all("publication", "sync", version, self.transport)
        if self.transport == "ipc":  # each rank has the buckets of its GPU
            held = zip(*(one.buckets for one in (first, *others)), strict=True)
            first = replace(first, buckets=tuple(reduce(or_, same) for same in held))
        return partial(self._send if self.transport == "nccl" else self._hand_over, engine, first)

    async def _hand_over(self, engine: str, publication: Publication, worker: Any) -> None:
        call = worker.fetch.remote(publication)
        await within(self.deadlines.sync, "sync", f"engine {engine!r} loading weights", call)

    async def _send(self, engine: str, publication: Publication, worker: Any) -> None:
        """Both ends at once: either waits for the other."""
        async with self.turn:
            line = await self._line(engine, worker)
            async with under_way(self._at_first("send", f"sending weights to engine {engine!r}", line)) as sent:
                try:
                    await self._hand_over(engine, publication, worker)
                    await sent
                except BaseException as error:  # either end may be in the middle of a bucket
                    self._hang_up(line)
                    if isinstance(error, Exception):
                        await _raise_trainers(sent)
                    raise

    async def _line(self, engine: str, worker: Any) -> str:
        """The line to a worker, connected when it is first asked for."""
        ends = (self.ranks[0], worker)
        if ends not in self.lines:
            line, what = uuid4().hex, f"connecting with engine {engine!r}"
            timeout = self.deadlines.sync / 2  # the rank must be back before those who wait for it give it up
            try:
                address = await self._at_first("listen", what, line, timeout)
                joining = worker.connect.remote(address, self.line_size, timeout)
                await asyncio.gather(
                    within(self.deadlines.sync, "sync", f"engine {engine!r} connecting with the trainer", joining),
                    self._at_first("connect", what, line, self.line_size, timeout),
                )
            except BaseException:
                self._hang_up(line)
                raise
            self.lines[ends] = line
        return self.lines[ends]

    def _hang_up(self, line: str) -> None:
        self.lines = {ends: other for ends, other in self.lines.items() if other != line}
        self.ranks[0].hang_up.remote(line)

    async def _at_first(self, method: str, doing: str, *arguments: Any) -> Any:
        """What rank 0 answers. Raises TrainerLostError when it is dead, lest its death be taken for an engine's."""
        call = getattr(self.ranks[0], method).remote(*arguments)
        try:
            return await within(self.deadlines.sync, "sync", f"trainer rank 0 {doing}", call)
        except RayActorError as error:
            raise TrainerLostError(f"trainer rank 0 died {doing}: {reason(error)}") from error

    async def save(self, folder: Path) -> None:
        await self._all("save", "save", str(folder))

    async def restore(self, folder: Path) -> None:
        await self._all("restore", "save", str(folder))

    async def export(self, folder: Path) -> None:
        await self._all("export", "save", str(folder))
        if self.probes:
            write_probes(folder, self.probes, (await self._all("probe", "sync", self.probes))[0])

    async def agree(self, engine: EngineHandle) -> Agreement:
        """How far the engine's live log-probs are from the trainer's on the probes; of several workers, the worst."""
        # at once, and beside what is sampled: neither side takes a core from the other
        probing = asyncio.create_task(self._all("probe", "sync", self.probes, False))
        try:
            asked = list(engine.workers)
            found = await engine.score(self.probes)
            expected = (await probing)[0]
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
        # from now on a worker that replaces a dead one must compute this
        engine.expected = (self.probes, expected)
        if engine.workers != asked:  # one was replaced meanwhile, and nobody knew what it must compute
            found = await engine.score(self.probes)
        agreements = [compare(expected, scores) for scores in found]
        return max(agreements, key=lambda agreement: (not agreement.ok, agreement.max_gap))

    async def prove(self, engine: EngineHandle, version: int) -> Mapping[str, float]:  # type: ignore[override]
        agreement = await self.agree(engine)
        if not agreement.ok:
            ours, theirs = await asyncio.gather(
                self._all("fingerprints", "sync", self.probes), engine.fingerprints(self.probes)
            )
            raise SyncError(
                f"version {version}: engine {engine.name!r} does not compute what the trainer computes: "
                f"{agreement.message}. First difference: {localise(ours[0], theirs)}"
            )
        return {
            "sync_probe.max": agreement.max_gap,
            "sync_probe.checked": float(agreement.checked),
            "sync_probe.skipped": float(agreement.skipped),
            "sync_probe.unreached_experts": float(len(agreement.unreached)),
        }

    async def _by_key(self, method: str, batch: Batch, *arguments: Any) -> dict[str, Any]:
        """What each rank says of its own samples, by their keys."""
        parts = await self._all(method, "step", ray.put(batch), *arguments)
        return {key: value for part in parts for key, value in part.items()}

    async def _all(self, method: str, deadline: str, *arguments: Any) -> list[Any]:
        """Call every rank; the first failure ends the wait, since the others may be stuck in a collective.

        The first to fail need not be the one that died: the others lose their connection to it before Ray knows."""
        async with self.turn:
            return await self._at_once(method, deadline, *arguments)

    async def _at_once(self, method: str, deadline: str, *arguments: Any) -> list[Any]:
        seconds = getattr(self.deadlines, deadline)
        calls = [
            asyncio.ensure_future(
                within(seconds, deadline, f"trainer rank {i}: {method}", getattr(rank, method).remote(*arguments))
            )
            for i, rank in enumerate(self.ranks)
        ]
        try:
            _, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            failures = _failures(calls)
            if not failures:
                return [call.result() for call in calls]
            if waiting:
                await asyncio.wait(waiting, timeout=GRACE_SECONDS)
            dead = next((error for error in _failures(calls) if isinstance(error, RayActorError)), None)
            if dead is None:
                raise failures[0]
            raise ActorLostError(f"a trainer rank died during {method!r}: {reason(dead)}") from dead
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)


async def _raise_trainers(sent: asyncio.Task[Any]) -> None:
    """Raise that the trainer was lost, where its end is why the engine's failed."""
    await asyncio.wait([sent], timeout=GRACE_SECONDS)
    if sent.done() and isinstance(lost := sent.exception(), TrainerLostError):
        raise lost


def _failures(calls: Sequence[asyncio.Future[Any]]) -> list[BaseException]:
    return [error for call in calls if call.done() and (error := call.exception()) is not None]


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
                    scores: list[Score] = await asyncio.wait_for(_future(call), longest)
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
