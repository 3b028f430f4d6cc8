"""All ranks of the trainer, called together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayActorError

from actors.artifacts import write_probes
from actors.handles.calls import TrainerLostError, reason, within
from actors.handles.engines import EngineHandle
from rlhf.agreement import Agreement, compare, localise
from rlhf.recipe import Deadlines
from rlhf.roles import ActorLostError, SyncError
from rlhf.tasks import under_way
from rlhf.types import Batch, Fit, Probe, Publication, StepStats, TrainSpec

GRACE_SECONDS = 10.0  # for Ray's word that a rank died, after other ranks lost their connection to it


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
