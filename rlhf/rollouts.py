"""Groups to learn from: sampled, scored, refilled when their rewards do not vary (DAPO §3.2).

Every group goes its own way: it is sampled as soon as an engine has room, and scored as soon as it is there.

InOrder     a step's groups are asked for when the weights that it starts from are published, and taken in the order of
            their prompts, however long each takes: the same seed gives the same run. max_staleness is 0.
AsFinished  the slowest group holds nobody up. Above staleness 0, a step begins with the groups of two steps and more
            under way or waiting (`AHEAD`). Tokens sampled more than max_staleness versions ago are counted and not
            learned from: the rest of their reply is, which they are then part of the prompt of. A group that has no
            others is dropped, and another is asked for.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from rlhf.algorithms.advantages import credited
from rlhf.algorithms.shaping import changed, punish_length
from rlhf.algorithms.table import estimator_of
from rlhf.data.formatting import as_prompts
from rlhf.data.rows import Row
from rlhf.data.stream import Draw
from rlhf.recipe import Rl
from rlhf.roles import Engine, Rewards, SyncError, SyncReport, Trainer
from rlhf.scoring import Judge, failure_rate, part_means, score
from rlhf.stage import Context, derive
from rlhf.tasks import ended
from rlhf.types import Batch, Group, Prompt, Sample, Sampling

# Steps' groups under way or waiting as a step begins, and so much more for each version that tokens may be old. With
# more the engine is fuller, and long replies have less time before they are too old
AHEAD, MORE = 1.5, 0.5
EMPTY_STEPS = 5
EXAMPLES = 4  # groups of a step that are kept for the report
AT_ONCE = 2  # calls of the rewards: a judge goes on with one's while functions score the other's

Drawn = tuple[str, int, Row]  # source, index in it, row


@dataclass(frozen=True)
class Part:
    """What one update of a step learns from: the groups `kept` of those `seen`. alone: nothing is sampled while the
    trainer learns from it."""

    index: int
    kept: list[Group]
    seen: list[Group]
    alone: bool = False


@dataclass
class Rollouts(ABC):
    """The groups of a stage, part by part. Leaving the context ends what is under way."""

    stage: Rl
    context: Context
    engine: Engine | None  # None: nothing is sampled
    judges: Mapping[str, Judge]
    stream: Draw
    serving: int = 0  # the version that the engine has
    parts: list[Part] = field(default_factory=list)  # of the step taken last, those without a signal included
    metrics: dict[str, float] = field(default_factory=dict)
    examples: list[Group] = field(default_factory=list)
    empty: int = 0  # steps in a row that had nothing to learn from
    proof: asyncio.Task[SyncReport] | None = None  # of the weights published last
    within_groups: bool = field(init=False)
    scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        estimator = estimator_of(self.stage)
        self.within_groups = estimator is not None and estimator.within_groups
        self.scorer = Scorer(self.stage, self.context.actors.rewards, self.judges)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self.scorer.close()
        if self.proof is None:
            return
        if isinstance(error, Exception):  # wrong weights may be why, and only the proof names them
            await asyncio.wait([self.proof])
            if not self.proof.cancelled() and isinstance(wrong := self.proof.exception(), SyncError):
                raise wrong from error
        await ended([self.proof])

    @abstractmethod
    def take(self, version: int) -> AsyncGenerator[Part]:
        """The parts of the step after `version`, an equal share of its prompts each, fewer groups when refills did not
        suffice; a part that has none is left out."""

    async def renew(self, trainer: Trainer, version: int) -> None:
        """Sample from the trainer's weights, as `version`, from now on, while they are proven to have arrived."""
        seconds = await trainer.publish(self.engine, version)
        self.serving = version
        self.proof = asyncio.create_task(self._prove(trainer, version, seconds))

    async def proven(self) -> SyncReport:
        """Wait until the weights published last are proven; nothing may be learned before. Raises SyncError."""
        assert self.proof is not None
        return await self.proof

    async def rest(self) -> None:
        """Nothing is asked before the next publish: engines that share a GPU with the trainer leave it their memory."""
        for engine in (self.engine, *(judge.engine for judge in self.judges.values())):
            if engine is not None:
                await engine.sleep()

    async def _prove(self, trainer: Trainer, version: int, seconds: float) -> SyncReport:
        started = time.perf_counter()
        metrics = await trainer.prove(self.engine, version)
        return SyncReport(seconds, time.perf_counter() - started, metrics)

    def state(self) -> dict[str, Any]:
        """JSON-able; see `restore`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to restore
        """Continue where `state` was taken."""

    def _prompts(self, drawn: Sequence[Drawn]) -> list[Prompt]:
        return as_prompts(drawn, self.context.tokenizer, True, self.context.recipe.chat)

    def _sampling(self, seed: int | None) -> Sampling:
        return Sampling(self.stage.group_size, self.stage.temperature, self.stage.max_tokens, seed)

    def _asked(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[tuple[int, Group]]:
        assert self.engine is not None
        return self.engine.stream(prompts, sampling)

    async def _held_back(self, groups: list[Group], version: int, index: int) -> list[Group]:
        """The groups with what their divergence from the reference costs taken off their scores."""
        kl = self.stage.kl
        if kl is None or kl.place != "reward" or not groups:
            return groups
        batch = self.context.batch(samples_of(groups, version), index)
        found = await self.context.actors.trainer.divergences(batch, kl.chosen)
        return [
            replace(
                group,
                scores=tuple(
                    changed(score, "kl", -kl.weight * found[key(group, version, place, i)])
                    for i, score in enumerate(group.scores)
                ),
            )
            for place, group in enumerate(groups)
        ]

    def _teaches(self, group: Group) -> bool:
        return not self.within_groups or informative(group)

    def _require_rewards(self, parts: list[Part]) -> None:
        seen = [group for part in parts for group in part.seen]
        failed = failure_rate(seen)
        if failed > self.stage.max_failed_rewards:
            notes = [s.note for group in seen for s in group.scores if s.outcome != "scored"]
            raise RuntimeError(
                f"stage {self.stage.name!r}: rewards failed on {failed:.1%} of the rollouts of {len(seen)} prompts, "
                f"above max_failed_rewards = {self.stage.max_failed_rewards:g}. The last failure: {notes[-1]}"
            )

    def _measure(self, parts: list[Part]) -> None:
        kept, seen = [g for part in parts for g in part.kept], [g for part in parts for g in part.seen]
        # one may be chance, and a policy that is right about everything must not end its run so
        self.empty = 0 if kept or not self.stage.learn else self.empty + 1
        if self.empty == EMPTY_STEPS:
            raise RuntimeError(
                f"stage {self.stage.name!r}: in {EMPTY_STEPS} steps of {len(seen)} groups none had rewards that vary, "
                "so there is nothing to learn from; use questions the model gets right sometimes (a difficulty "
                "filter), or larger groups"
            )
        rollouts = [rollout for group in seen for rollout in group.rollouts]
        self.parts, self.examples = parts, (kept or seen)[:EXAMPLES]
        self.metrics = part_means(seen) | {
            "rollouts": float(len(rollouts)),
            "updates": float(sum(bool(part.kept) for part in parts)),
            "informative": len(kept) / len(seen),
            "reward_failures": failure_rate(seen),
            **self.scorer.lag(),
            "tokens.mean": sum(len(r.token_ids) for r in rollouts) / len(rollouts),
            "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        }


@dataclass
class InOrder(Rollouts):
    """All parts of a step are under way at once, and take turns in the engine, so that the first is soon there: the
    trainer learns from it while the next is sampled."""

    sampling: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, version: int) -> AsyncGenerator[Part]:
        parts = list[asyncio.Task[Part]]()
        for index in range(self.stage.updates_per_step):
            parts.append(asyncio.create_task(self._part(version, index, parts[-1] if parts else None)))
        done = list[Part]()
        try:
            for task in parts:
                part = replace(await task, alone=task is parts[-1])
                done.append(part)
                self._require_rewards(done)
                if part.kept:
                    yield part
            self._measure(done)
        finally:
            await ended(parts)

    async def _part(self, version: int, index: int, before: asyncio.Task[Part] | None) -> Part:
        stage, kept, seen = self.stage, list[Group](), list[Group]()
        share = stage.prompts_per_step // stage.updates_per_step
        if before is not None and stage.refill_rounds and self.within_groups:
            await asyncio.wait([before])  # prompts are drawn in one order, however long replies take
        for refill in range(stage.refill_rounds + 1):
            prompts = self._prompts(self.stream.take(share - len(kept)))
            seed = derive(self.context.recipe.seed, stage.name, "rollout", version, index, refill)
            groups = await self._together(prompts, self._sampling(seed))
            _require_version(groups, self.serving)
            seen += await self._held_back(groups, version, index)
            kept = [group for group in seen if self._teaches(group)]
            if len(kept) >= share:
                break
        return Part(index, kept, seen)

    async def _together(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """The prompts' groups in order, scored; the next part may sample as soon as all are sampled."""
        scored: dict[int, asyncio.Future[Group]] = {}
        try:
            async with self.sampling, aclosing(self._asked(prompts, sampling)) as sampled:
                async for place, group in sampled:
                    scored[place] = self.scorer.add(group)
            return [await scored[place] for place in range(len(prompts))]
        finally:
            await ended(scored.values())


@dataclass
class AsFinished(Rollouts):
    """Groups have numbers, in the order they are asked for.

    drawn     rows of those that are under way, or finished and not taken
    finished  (number, group or what went wrong), the one asked for first at the front
    again     rows that were drawn before an interruption, and not learned from
    """

    asked: int = 0
    drawn: dict[int, Drawn] = field(default_factory=dict)
    finished: asyncio.PriorityQueue[tuple[int, Group | BaseException]] = field(default_factory=asyncio.PriorityQueue)
    again: list[Drawn] = field(default_factory=list)
    streams: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await ended(self.streams)
        await super().__aexit__(kind, error, trace)

    def state(self) -> dict[str, Any]:
        waiting = [self.drawn[number] for number in sorted(self.drawn)]
        return {"asked": self.asked, "again": [[source, index] for source, index, _ in [*waiting, *self.again]]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Rows that were not learned from are asked again."""
        self.asked = int(state["asked"])
        self.again = [(source, index, self.context.rows(source)[index]) for source, index in state["again"]]

    async def take(self, version: int) -> AsyncGenerator[Part]:
        stage, parts, taken = self.stage, list[Part](), 0
        share = stage.prompts_per_step // stage.updates_per_step
        earliest, lags, stale, dropped = version - stage.max_staleness, list[int](), list[int](), 0
        ahead = AHEAD + MORE * stage.max_staleness if stage.max_staleness else 1
        room = math.ceil(stage.prompts_per_step * min(ahead, stage.steps - version))
        for index in range(stage.updates_per_step):
            kept, seen, after = list[Group](), list[Group](), room - share * (index + 1)
            while len(kept) < share and (left := share * (1 + stage.refill_rounds) - len(seen)) > 0:
                self._ask(min(room - taken, left + after))
                found = await self._oldest(min(left, share - len(kept)))
                fresh = [group for group in found if last_version(group) >= earliest]
                dropped += len(found) - len(fresh)
                whole = await self._held_back(fresh, version, index)
                scored = [mark_stale(group, earliest) for group in whole]
                lags += [version - first_version(group) for group in scored]
                stale += [rollout.num_stale for group in scored for rollout in group.rollouts]
                teaching = [group for group in scored if self._teaches(group)]
                seen += scored
                kept += teaching
                # where groups are refilled, one that teaches nothing makes room for another
                taken += len(teaching if stage.refill_rounds else scored)
            taken = share * (index + 1)  # what a part lacks, no other has a place for
            parts.append(Part(index, kept, seen, alone=not after and not self.drawn))
            self._require_rewards(parts)
            if kept:
                yield parts[-1]
        self._measure(parts)
        self.metrics |= {
            "staleness": sum(lags) / len(lags),
            "staleness_max": float(max(lags)),
            "stale_dropped": float(dropped),
            "stale_tokens": float(sum(stale)),
        }

    def _ask(self, limit: int) -> None:
        """Ask for groups until `limit` are under way or waiting to be taken."""
        missing = limit - len(self.drawn)
        if missing <= 0:
            return
        rows = [*self.again[:missing], *self.stream.take(max(0, missing - len(self.again)))]
        del self.again[:missing]
        numbers = range(self.asked, self.asked + missing)
        self.drawn |= dict(zip(numbers, rows, strict=True))
        stream = asyncio.create_task(self._stream(numbers, self._prompts(rows), self._sampling(None)))
        self.streams.add(stream)
        stream.add_done_callback(self.streams.discard)
        self.asked += missing

    async def _stream(self, numbers: Sequence[int], prompts: Sequence[Prompt], sampling: Sampling) -> None:
        unanswered = set(numbers)
        try:
            async with aclosing(self._asked(prompts, sampling)) as sampled:
                async for place, group in sampled:
                    unanswered.discard(numbers[place])
                    self.scorer.add(group).add_done_callback(partial(self._finish, numbers[place]))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for these
            for number in unanswered:
                self.finished.put_nowait((number, error))

    def _finish(self, number: int, scored: asyncio.Future[Group]) -> None:
        if not scored.cancelled():
            self.finished.put_nowait((number, scored.exception() or scored.result()))

    async def _oldest(self, most: int) -> list[Group]:
        """Of the groups that are finished, those asked for first; when there is none, the next to finish."""
        ready = [await self.finished.get()]
        while len(ready) < most and not self.finished.empty():
            ready.append(self.finished.get_nowait())
        groups = list[Group]()
        for number, found in ready:
            del self.drawn[number]
            if isinstance(found, BaseException):
                raise found
            groups.append(found)
        return groups


@dataclass
class Scorer:
    """Scores groups as they come: those that came while others were scored, together."""

    stage: Rl
    rewards: Rewards
    judges: Mapping[str, Judge]
    waiting: list[tuple[Group, asyncio.Future[Group], float]] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)  # seconds from sampled to scored, of each group since last asked
    under_way: set[asyncio.Task[None] | None] = field(default_factory=set)

    def add(self, group: Group) -> asyncio.Future[Group]:
        """The group with its scores, when it has them."""
        found: asyncio.Future[Group] = asyncio.get_running_loop().create_future()
        self.waiting.append((group, found, time.perf_counter()))
        if len(self.under_way) < AT_ONCE:
            self.under_way.add(asyncio.create_task(self._work()))
        return found

    def lag(self) -> dict[str, float]:
        """How long groups have waited for their scores since this was asked last, in seconds: where rewards are faster
        than sampling, the mean is one call of them, and nobody waits longer."""
        found, self.lags = self.lags, []
        return {"scoring_lag": sum(found) / len(found), "scoring_lag.max": max(found)} if found else {}

    async def close(self) -> None:
        """Give up what is not scored yet."""
        await ended(task for task in self.under_way if task is not None)

    async def _work(self) -> None:
        while self.waiting:
            taken, self.waiting = self.waiting, []
            try:
                scored = await score([group for group, _, _ in taken], self.stage, self.rewards, self.judges)
                if self.stage.overlong is not None:
                    scored = punish_length(scored, self.stage.max_tokens, self.stage.overlong)
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for these
                for _, found, _ in taken:
                    if not found.done():
                        found.set_exception(error)
            else:
                self.lags += [time.perf_counter() - since for _, _, since in taken]
                for (_, found, _), group in zip(taken, scored, strict=True):
                    if not found.done():
                        found.set_result(group)
        # here, not in a callback later: whatever is added from now on needs a new call
        self.under_way.discard(asyncio.current_task())


def _require_version(groups: list[Group], version: int) -> None:
    """Every token must be of the policy the step starts from: its log-probabilities are the old ones."""
    found = {v for group in groups for rollout in group.rollouts for v in rollout.versions} - {version}
    if found:
        raise RuntimeError(f"the engine sampled with version {min(found)} where the step learns from version {version}")


def informative(group: Group) -> bool:
    """Whether the group's scored rewards differ: without a difference every advantage is 0."""
    values = {score.value for score in group.scores if score.outcome == "scored"}
    return len(values) > 1


def mark_stale(group: Group, earliest: int) -> Group:
    """The group, its tokens that versions before `earliest` sampled counted. Versions only grow along a reply."""
    rollouts = tuple(replace(one, num_stale=bisect_left(one.versions, earliest)) for one in group.rollouts)
    return replace(group, rollouts=rollouts)


def first_version(group: Group) -> int:
    """The version that sampled the first of the group's tokens that are learned from."""
    return min(one.versions[one.num_stale] for one in group.rollouts if one.num_stale < len(one.versions))


def last_version(group: Group) -> int:
    """The version that sampled the group's last token."""
    return max(one.versions[-1] for one in group.rollouts)


async def pack(stage: Rl, context: Context, part: Part, version: int) -> Batch:
    """The optimizer step that learns from `part`: its groups with their advantages, cut into ranks and micro-batches.
    Failed scores weigh 0; rollouts whose every token is too old are compared with and left out."""
    groups, index = part.kept, version * stage.updates_per_step + part.index
    samples, estimator = samples_of(groups, version), estimator_of(stage)
    if estimator is not None:
        found = estimator.estimate([[score.value for score in group.scores] for group in groups])
        advantages = [advantage for row in found for advantage in row]
        rated = zip(samples, advantages, strict=True)
        samples = [replace(one, advantage=advantage) for one, advantage in rated if one.num_completion]
    else:
        critic = stage.foretelling
        assert critic is not None
        scored = zip(samples, (score.value for group in groups for score in group.scores), strict=True)
        learned = [(one, score) for one, score in scored if one.num_completion]
        said = await context.actors.trainer.values(context.batch([one for one, _ in learned], index), part.alone)
        values = [said[one.key] for one, _ in learned]
        given = credited([score for _, score in learned], values, critic.discount, critic.smoothing)
        rows = zip(learned, *given, strict=True)
        samples = [replace(one, advantages=tuple(row), returns=tuple(returns)) for (one, _), row, returns in rows]
    return context.batch(samples, index)


def samples_of(groups: Sequence[Group], version: int) -> list[Sample]:
    """A sample of each rollout, before anything is said of its advantage; its tokens too old to learn from are part of
    its prompt."""
    return [
        Sample(
            key=key(group, version, place, i),
            token_ids=group.prompt_ids + rollout.token_ids,
            prompt_length=len(group.prompt_ids) + rollout.num_stale,
            media=group.prompt.media,
            weight=float(group.scores[i].outcome == "scored"),
            logprobs=rollout.logprobs[rollout.num_stale :],
            current=set(rollout.versions[rollout.num_stale :]) == {version},
        )
        for place, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]


def key(group: Group, version: int, place: int, rollout: int) -> str:
    """The name of a sample. Small data may bring a prompt twice into a step: `place` is its group's in the batch."""
    return f"{group.prompt.key}@{version}.{place}.{rollout}"
