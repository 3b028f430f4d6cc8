"""Handles on workers that die or hang, with workers that are plain objects."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import ray
from ray.exceptions import RayActorError

from actors.device import DeviceBucket
from actors.handles import EngineHandle, Loads, RewardsHandle, ScalarHandle, TrainerHandle, reason
from rewards.base import Item
from rlhf.recipe import Deadlines
from rlhf.roles import ActorLostError, SyncError
from rlhf.types import Batch, Group, Probe, ProbeScores, Prompt, Publication, Rollout, Sampling, Score, StepStats

T = TypeVar("T")
Ended = list[tuple[int, Group]]


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda worker: None)
    monkeypatch.setattr(ray, "put", lambda value: value)


class Remote:
    """What Ray makes of a method: `worker.method.remote(...)` is awaitable."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Streaming:
    """The same of a method that streams: async iteration gives what can be awaited."""

    def __init__(self, call: Callable[..., Awaitable[list[Group]]]) -> None:
        self.call = call

    def options(self, num_returns: str) -> Streaming:
        assert num_returns == "streaming"
        return self

    async def remote(self, asked: list[Prompt], sampling: Sampling, _: str) -> AsyncGenerator[Awaitable[Ended]]:
        found = await self.call(asked, sampling)
        for place in reversed(range(len(found))):  # in whatever order they end
            yield _ready([(place, found[place])])


async def _ready(value: T) -> T:
    return value


class Engine:
    """Answers, unless it is told to die: then every call in flight and every later one fails."""

    def __init__(self) -> None:
        self.dead = asyncio.Event()
        self.loads = 0
        self.logprob = -0.5
        self.score = Remote(self._score)
        self.stream, self.heartbeat, self.fetch = Streaming(self._generate), Remote(self._beat), Remote(self._fetch)
        self.aborts = 0
        self.abort = Remote(self._abort)

    async def _generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        if sampling.seed == 0:  # asked before the death
            await self.dead.wait()
        if self.dead.is_set():
            raise RayActorError
        return [Group(prompt, (1,), ()) for prompt in prompts]

    async def _score(self, probes: list[Probe]) -> ProbeScores:
        if self.dead.is_set():
            raise RayActorError
        return ProbeScores(((1, 2),), ((self.logprob,),))

    def _abort(self, name: str) -> None:
        assert name
        self.aborts += 1

    async def _beat(self) -> None:
        await asyncio.sleep(0)

    async def _fetch(self, publication: Any) -> float:
        self.loads += 1
        return 0.0


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "s", "?", (1,), (), {}) for i in range(count)]


def test_an_engine_that_dies_under_several_calls_is_started_once(tmp_path: Path) -> None:
    async def go() -> tuple[EngineHandle, list[Engine], list[list[Group]]]:
        started = [Engine()]

        def start(index: int, folder: Path) -> Engine:
            engine = Engine()
            engine.dead.clear()
            engine.stream = Streaming(lambda asked, _: engine._generate(asked, Sampling(seed=1)))
            started.append(engine)
            return engine

        handle = EngineHandle("policy", tmp_path, "digest", start, Deadlines(), [started[0]])
        await handle.load(published)
        calls = [asyncio.create_task(handle.generate(prompts(2), Sampling(seed=0))) for _ in range(4)]
        await asyncio.sleep(0)
        started[0].dead.set()
        return handle, started, await asyncio.wait_for(asyncio.gather(*calls), 10)

    handle, started, groups = asyncio.run(go())
    assert handle.restarts == 1
    assert len(started) == 2
    assert started[1].loads == 1  # the weights of before, before it is asked anything
    assert [len(found) for found in groups] == [2] * 4


async def published() -> Callable[[Any], Awaitable[None]]:
    """How a worker gets a publication that no fake looks into."""
    return lambda worker: worker.fetch.remote(None)


def test_weights_are_not_written_over_while_a_new_worker_reads_them(tmp_path: Path) -> None:
    async def go() -> list[str]:
        said, begun, read = list[str](), asyncio.Event(), asyncio.Event()
        replacement, lost = Engine(), Engine()

        async def slow(publication: Any) -> float:
            said.append(f"reads {publication}")
            begun.set()
            await read.wait()
            said.append(f"has read {publication}")
            return 0.0

        async def written(version: str) -> Callable[[Any], Awaitable[None]]:
            said.append(f"writes {version}")
            return lambda worker: worker.fetch.remote(version)

        handle = EngineHandle("policy", tmp_path, "digest", lambda index, folder: replacement, Deadlines(), [lost])
        await handle.load(lambda: written("first"))
        replacement.fetch = Remote(slow)
        lost.dead.set()
        asked = asyncio.create_task(handle.generate(prompts(1), Sampling(seed=1)))
        await asyncio.wait_for(begun.wait(), 10)
        again = asyncio.create_task(handle.load(lambda: written("second")))
        for _ in range(20):
            await asyncio.sleep(0)
        read.set()
        await asyncio.wait_for(asyncio.gather(asked, again), 10)
        return said

    assert asyncio.run(go()) == [
        "writes first",
        "reads first",
        "has read first",
        "writes second",
        "reads second",
        "has read second",
    ]


def test_an_engine_that_shares_a_gpu_sleeps_until_it_is_asked(tmp_path: Path) -> None:
    async def go(sleeps: bool) -> list[str]:
        said, worker = list[str](), Engine()

        async def tell(what: str) -> None:
            await asyncio.sleep(0)
            said.append(what)

        async def answer(asked: list[Prompt], _: Sampling) -> list[Group]:
            said.append("answers")
            return [Group(prompt, (1,), ()) for prompt in asked]

        worker.sleep, worker.wake = Remote(lambda: tell("sleeps")), Remote(lambda: tell("wakes"))  # type: ignore[attr-defined]
        worker.stream, worker.fetch = Streaming(answer), Remote(lambda _: tell("loads"))
        handle = EngineHandle(
            "policy", tmp_path, "digest", lambda index, folder: worker, Deadlines(), [worker], sleeps=sleeps
        )
        for _ in range(2):
            await handle.sleep()
        calls = [handle.generate(prompts(1), Sampling(seed=1)) for _ in range(2)]
        await asyncio.wait_for(asyncio.gather(*calls), 10)
        await handle.sleep()
        await asyncio.wait_for(handle.load(published), 10)
        return said

    assert asyncio.run(go(True)) == ["sleeps", "wakes", "answers", "answers", "sleeps", "wakes", "loads"]
    assert asyncio.run(go(False)) == ["answers", "answers", "loads"]


class Sender:
    """The trainer's first rank, and a worker's end of its line: either waits for the other, as a broadcast does."""

    def __init__(self, said: list[str]) -> None:
        self.said, self.meet = said, asyncio.Barrier(2)
        self.publication = Remote(lambda version, transport: _ready(Publication(version, (transport,), {})))
        self.listen = Remote(lambda line, timeout: _ready("here:1"))
        self.connect, self.send = Remote(self._connect), Remote(self._send)
        self.hang_up = Remote(lambda line: said.append("hung up"))

    async def _connect(self, line: str, size: int, seconds: float) -> None:
        await self.meet.wait()
        self.said.append(f"line of {size}, {seconds:g} s")

    async def _send(self, line: str) -> None:
        await self.meet.wait()
        self.said.append("sent")

    def engine(self, dies: bool = False) -> Engine:
        async def connect(address: str, size: int, seconds: float) -> None:
            assert address == "here:1"
            await self.meet.wait()

        async def fetch(publication: Publication) -> float:
            if dies:
                raise RayActorError
            await self.meet.wait()
            self.said.append(f"has {publication.version}")
            return 0.0

        made = Engine()
        made.connect, made.fetch = Remote(connect), Remote(fetch)  # type: ignore[attr-defined]
        return made


def test_weights_that_are_sent_have_a_line_for_each_worker(tmp_path: Path) -> None:
    async def go() -> tuple[list[str], int]:
        said = list[str]()
        sender = Sender(said)
        trainer = TrainerHandle([sender], Deadlines(sync=5), "nccl", 3)
        lost = sender.engine(dies=True)
        workers = [sender.engine(), lost]
        handle = EngineHandle("policy", tmp_path, "digest", lambda index, folder: sender.engine(), Deadlines(), workers)
        for version in (1, 2):
            await asyncio.wait_for(trainer.publish(handle, version), 10)
        return said, len(trainer.lines)

    said, lines = asyncio.run(go())
    connected = "line of 3, 2.5 s"
    first, second, replacement = [connected, "sent", "has 1"], [connected, "hung up"], [connected, "sent", "has 1"]
    assert sorted(said[:8]) == sorted([*first, *second, *replacement])
    assert sorted(said[8:]) == sorted(["sent", "has 2"] * 2)  # by the lines there are
    assert lines == 2


@pytest.mark.parametrize("first", ["the trainer's end", "the engine's end"])
def test_a_trainer_that_dies_sending_is_not_taken_for_the_engine(tmp_path: Path, first: str) -> None:
    async def go() -> int:
        sender, heard = Sender([]), asyncio.Event()

        async def send(line: str) -> None:
            if first == "the engine's end":
                await heard.wait()
            raise RayActorError

        async def fetch(publication: Publication) -> None:
            if first == "the engine's end":
                heard.set()
                raise ActorLostError("the engine of this rollout worker ended with RuntimeError: connection closed")
            await asyncio.Event().wait()

        worker = sender.engine()
        worker.fetch, sender.send = Remote(fetch), Remote(send)
        started = list[Engine]()

        def start(index: int, folder: Path) -> Engine:
            started.append(Engine())
            return started[-1]

        trainer = TrainerHandle([sender], Deadlines(sync=1), "nccl", 2)
        handle = EngineHandle("policy", tmp_path, "digest", start, Deadlines(), [worker])
        with pytest.raises(ActorLostError, match="rank 0 died sending weights to engine 'policy'"):
            await asyncio.wait_for(trainer.publish(handle, 1), 10)
        assert not trainer.lines
        return len(started)

    assert asyncio.run(go()) == 0


def test_every_rank_hands_out_what_is_on_its_gpu() -> None:
    def rank(uuid: str) -> Any:
        class Rank:
            publication = Remote(
                lambda version, transport: _ready(
                    Publication(version, tuple(DeviceBucket({uuid: (uuid, i)}, ()) for i in range(2)), {"w": (1,)})
                )
            )

        return Rank()

    async def go() -> Publication:
        trainer, given = TrainerHandle([rank("a"), rank("b")], Deadlines(), "ipc"), list[Publication]()

        class Worker:
            fetch = Remote(lambda publication: _ready(given.append(publication)))

        await (await trainer._published("policy", 7))(Worker())
        return given[0]

    found = asyncio.run(go())
    assert (found.version, found.names) == (7, {"w": (1,)})
    assert [dict(bucket.handles) for bucket in found.buckets] == [{"a": ("a", i), "b": ("b", i)} for i in range(2)]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_worker_that_replaces_another_is_proven_before_it_is_asked(tmp_path: Path, wrong: bool) -> None:
    async def go() -> list[Group]:
        replacement = Engine()
        replacement.logprob -= 0.1 * wrong
        handle = EngineHandle("policy", tmp_path, "digest", lambda index, folder: replacement, Deadlines(), [Engine()])
        await handle.load(published)
        probe = Probe((1, 2), ())
        handle.expected = ([probe], (await handle.score([probe]))[0])
        handle.workers[0].dead.set()
        return await asyncio.wait_for(handle.generate(prompts(2), Sampling(seed=1)), 10)

    if wrong:
        with pytest.raises(SyncError, match="engine 'policy' does not compute what it was given"):
            asyncio.run(go())
    else:
        assert len(asyncio.run(go())) == 2


def test_an_engine_that_dies_again_and_again_ends_the_run_by_name(tmp_path: Path) -> None:
    def start(index: int, folder: Path) -> Engine:
        engine = Engine()
        engine.dead.set()
        return engine

    handle = EngineHandle("policy", tmp_path, "digest", start, Deadlines(), [start(0, tmp_path)])
    with pytest.raises(RuntimeError, match="engine 'policy': its worker 0 was lost three times over one call"):
        asyncio.run(handle.generate(prompts(1), Sampling(seed=1)))


@pytest.mark.parametrize("trouble", ["hangs", "lost its engine"])
def test_a_worker_that_hangs_or_lost_its_engine_is_replaced(tmp_path: Path, trouble: str) -> None:
    async def fail(asked: list[Prompt], _: Sampling) -> list[Group]:
        if trouble == "hangs":
            await asyncio.Event().wait()
        raise ActorLostError("the engine of this rollout worker ended with ValueError: out of blocks")

    async def go() -> tuple[EngineHandle, list[Group]]:
        broken = Engine()
        broken.stream = Streaming(fail)
        deadlines = Deadlines(generate=0.05)
        handle = EngineHandle("policy", tmp_path, "digest", lambda index, folder: Engine(), deadlines, [broken])
        return handle, await asyncio.wait_for(handle.generate(prompts(2), Sampling(seed=1)), 10)

    handle, groups = asyncio.run(go())
    assert handle.restarts == 1
    assert len(groups) == 2


def test_what_a_worker_answered_before_it_died_is_not_asked_again(tmp_path: Path) -> None:
    class Half(Streaming):
        async def remote(self, asked: list[Prompt], sampling: Sampling, _: str) -> AsyncGenerator[Awaitable[Ended]]:
            yield _ready([(place, Group(asked[place], (9,), ())) for place in (2, 0)])
            raise RayActorError

    async def go() -> tuple[list[Group], list[str]]:
        broken, fresh, again = Engine(), Engine(), list[str]()
        broken.stream = Half(broken._generate)

        async def noted(asked: list[Prompt], _: Sampling) -> list[Group]:
            again.extend(prompt.key for prompt in asked)
            return [Group(prompt, (1,), ()) for prompt in asked]

        fresh.stream = Streaming(noted)
        handle = EngineHandle("policy", tmp_path, "digest", lambda index, folder: fresh, Deadlines(), [broken])
        found = await asyncio.wait_for(handle.generate(prompts(4), Sampling(seed=1)), 10)
        assert not handle.waiting.total()
        return found, again

    groups, again = asyncio.run(go())
    assert [group.prompt.key for group in groups] == ["p0", "p1", "p2", "p3"]
    assert [group.prompt_ids for group in groups] == [(9,), (1,), (9,), (1,)]
    assert again == ["p1", "p3"]


def test_a_prompt_goes_to_the_worker_that_has_the_fewest(tmp_path: Path) -> None:
    async def go() -> list[list[str]]:
        asked: list[list[str]] = [[], []]
        free = asyncio.Event()

        def engine(index: int) -> Engine:
            made = Engine()

            async def answer(wanted: list[Prompt], _: Sampling) -> list[Group]:
                asked[index] += [prompt.key for prompt in wanted]
                await free.wait()
                return [Group(prompt, (1,), ()) for prompt in wanted]

            made.stream = Streaming(answer)
            return made

        workers = [engine(0), engine(1)]
        handle = EngineHandle("policy", tmp_path, "digest", lambda index, folder: Engine(), Deadlines(), workers)
        calls = [asyncio.create_task(handle.generate(prompts(count), Sampling(seed=1))) for count in (3, 1, 2)]
        await asyncio.sleep(0.05)
        free.set()
        await asyncio.wait_for(asyncio.gather(*calls), 10)
        return asked

    assert [len(keys) for keys in asyncio.run(go())] == [3, 3]


def test_loads_find_the_worker_with_the_fewest_as_a_search_would() -> None:
    pick, loads, slow = random.Random(0), Loads(5), [0] * 5
    for _ in range(2000):
        if pick.random() < 0.5 or not any(slow):
            found = loads.add()
            assert found == slow.index(min(slow))
            slow[found] += 1
        else:
            index = pick.choice([index for index, load in enumerate(slow) if load])
            answered = pick.randint(0, slow[index])
            loads.remove(index, answered)
            slow[index] -= answered
        assert loads.total() == sum(slow)
        assert len(loads._heap) <= 64 + 4 * 5


def test_who_stops_listening_ends_what_was_asked(tmp_path: Path) -> None:
    async def go() -> int:
        engine = Engine()
        handle = EngineHandle("policy", tmp_path, "digest", lambda index, folder: Engine(), Deadlines(), [engine])
        call = asyncio.create_task(handle.generate(prompts(2), Sampling(seed=0)))  # never answered
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert not handle.waiting.total()
        return engine.aborts

    assert asyncio.run(go()) == 1


def test_the_reason_of_a_death_is_in_the_last_line() -> None:
    said = "The actor died because of an error raised in its creation task, ray::X (pid=1)\n  File\nValueError: why\n"
    assert reason(RuntimeError(said)) == "ValueError: why"
    assert reason(RayActorError()) != ""


class Rank:
    """A trainer rank whose step raises what it is given, after what it waits for."""

    def __init__(self, error: Exception | None, after: asyncio.Event, before: asyncio.Event) -> None:
        self.error, self.after, self.before = error, after, before
        self.step = Remote(self._step)

    async def _step(self, batch: Batch, fresh: bool, alone: bool) -> StepStats:
        await self.after.wait()
        self.before.set()
        if self.error is not None:
            raise self.error
        return StepStats({"loss": 1.0})


def step_of_two(first: Exception | None, second: Exception | None) -> StepStats:
    """Both ranks step; the first is done before the second."""

    async def go() -> StepStats:
        start, between = asyncio.Event(), asyncio.Event()
        start.set()
        ranks = [Rank(first, start, between), Rank(second, between, asyncio.Event())]
        batch = Batch(((), ()), 0, 0)
        return await asyncio.wait_for(TrainerHandle(ranks, Deadlines()).step(batch), 20)

    return asyncio.run(go())


def test_a_rank_that_died_is_found_behind_one_that_lost_its_connection() -> None:
    assert step_of_two(None, None).metrics == {"loss": 1.0}
    with pytest.raises(ActorLostError, match="a trainer rank died during 'step'"):
        step_of_two(RuntimeError("connection closed by peer"), RayActorError())
    with pytest.raises(FloatingPointError, match="step 3"):
        step_of_two(FloatingPointError("step 3"), FloatingPointError("step 3"))
    with pytest.raises(ActorLostError):
        step_of_two(RayActorError(), None)


class Worker:
    """Answers, or does what is told: "hang" never answers, "die" ends."""

    def __init__(self, does: str) -> None:
        self.does = does
        self.score = Remote(self._score)
        self.__ray_ready__ = Remote(self._ready)

    async def _ready(self) -> None:
        pass

    async def _told(self) -> None:
        if self.does == "hang":
            await asyncio.Event().wait()
        if self.does == "die":
            raise RayActorError

    async def _score(self, function: str, items: list[Item], options: dict[str, float]) -> list[Score]:
        await self._told()
        return [Score("scored", options["worth"]) for _ in items]


@pytest.mark.parametrize(
    ("workers", "outcome"),
    [
        (["good"], "scored"),
        (["die", "good"], "scored"),
        (["hang", "good"], "scored"),
        (["die", "die", "good"], "failed"),
        (["hang", "hang", "good"], "timed_out"),
    ],
)
def test_a_reward_worker_that_is_lost_is_replaced_and_asked_once_more(
    workers: list[str], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.handles.rewards.START", 0.01)  # what an import in the worker may take
    rollouts = tuple(Rollout((1,), (0.0,), (0,), "?", "stop") for _ in range(3))
    groups = [Group(prompts(1)[0], (1,), rollouts)]
    coming = iter(workers)

    async def go() -> list[list[Score]]:
        deadlines = Deadlines(reward=0.01, start=0.05)
        handle = RewardsHandle(lambda index: Worker(next(coming)), deadlines, [Worker(next(coming))])
        found = await asyncio.wait_for(handle.score("fine", groups, {"worth": 0.5}), 10)
        if outcome != "scored":  # the one that came last serves the next call
            assert (await handle.score("fine", groups, {"worth": 0.5}))[0][0].value == 0.5
        return found

    (found,) = asyncio.run(go())
    assert [score.outcome for score in found] == [outcome] * 3
    assert all("reward worker 0" in score.note for score in found if outcome != "scored")


class Scoring(Worker):
    """A reward model that answers, or does what is told."""

    async def _score(self, groups: list[Group]) -> list[list[Score]]:
        await self._told()
        return [[Score("scored", 0.5)] for _ in groups]


def scored_by(*workers: str, calls: int = 2) -> tuple[list[list[list[Score]]], int]:
    """Calls at once of a reward model whose processes do this, one after the other."""
    coming = map(Scoring, workers)

    async def go() -> tuple[list[list[list[Score]]], int]:
        scalar = ScalarHandle("ranked", lambda: next(coming), Deadlines(generate=0.05), next(coming))
        handle = RewardsHandle(lambda index: None, Deadlines(), [], {"ranked": scalar})
        groups = [Group(prompt, (1,), ()) for prompt in prompts(2)]
        asked = (handle.scalar("ranked", groups[: count + 1]) for count in range(calls))
        return list(await asyncio.wait_for(asyncio.gather(*asked), 10)), scalar.restarts

    return asyncio.run(go())


@pytest.mark.parametrize("workers", [["good"], ["die", "good"], ["hang", "good"], ["die", "hang", "good"]])
def test_a_reward_model_that_is_lost_is_started_again_and_asked_again(workers: list[str]) -> None:
    found, restarts = scored_by(*workers)
    assert found == [[[Score("scored", 0.5)]] * count for count in (1, 2)]
    assert restarts == len(workers) - 1


def test_a_reward_model_that_is_always_lost_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="reward model 'ranked' was lost 3 times over one call"):
        scored_by("die", "hang", "die", "good", calls=1)


def test_only_what_has_probes_leaves_their_scores(tmp_path: Path) -> None:
    class Exporting:
        def __init__(self) -> None:
            self.begin, self.export, self.probe = Remote(self._begin), Remote(self._export), Remote(self._probe)

        async def _begin(self, spec: Any) -> Any:
            return SimpleNamespace(num_parameters=1, num_trainable=1)

        async def _export(self, folder: str) -> None:
            pass

        async def _probe(self, probes: Any) -> ProbeScores:
            return ProbeScores(((1, 2),), ((-0.5,),))

    async def go(probes: list[Probe]) -> bool:
        trainer = TrainerHandle([Exporting()], Deadlines())
        await trainer.begin(None, probes)  # type: ignore[arg-type]
        await trainer.export(tmp_path)
        return (tmp_path / "probe_scores.json").exists()

    assert not asyncio.run(go([]))
    assert asyncio.run(go([Probe((1, 2))]))
