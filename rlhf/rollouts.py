"""Groups to learn from: sampled, scored, refilled when their rewards do not vary (DAPO §3.2).

Every group goes its own way: it is sampled as soon as an engine has room, and scored as soon as it is there.

max_staleness 0  a step's groups are asked for when the weights that it starts from are published, and taken in the
                 order of their prompts, however long each takes: the same seed gives the same run.
max_staleness S  up to S + 1 steps' groups are under way or waiting, while the trainer learns; they are taken as they
                 are finished, so that the slowest holds nobody up. One whose oldest token was sampled more than S
                 versions ago is dropped, counted, and another is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.algorithms.shaping import changed, punish_length
from rlhf.algorithms.table import estimator_of
from rlhf.data.formatting import as_prompts
from rlhf.data.rows import Row
from rlhf.data.stream import Stream
from rlhf.recipe import Rl
from rlhf.roles import Engine
from rlhf.scoring import Judge, failure_rate, part_means, score
from rlhf.stage import Context, derive
from rlhf.types import Batch, Group, Prompt, Sample, Sampling

EXAMPLES = 4  # groups of a step that are kept for the report

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
class Rollouts:
    """The groups of a stage, part by part. Leaving the context ends what is under way."""

    stage: Rl
    context: Context
    engine: Engine
    judges: Mapping[str, Judge]
    stream: Stream
    metrics: dict[str, float] = field(default_factory=dict)
    examples: list[Group] = field(default_factory=list)
    # ahead of the trainer: groups asked for so far, those under way, and those that are finished, by their numbers
    asked: int = 0
    under_way: dict[asyncio.Task[Group], int] = field(default_factory=dict)
    finished: dict[int, Group] = field(default_factory=dict)
    drawn: dict[int, Drawn] = field(default_factory=dict)
    again: list[Drawn] = field(
        default_factory=list
    )  # rows that were drawn before an interruption, and not learned from
    within_groups: bool = field(init=False)
    # parts take turns in the engine, so that the first is soon there
    sampling: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.within_groups = estimator_of(self.stage).within_groups

    async def __aenter__(self) -> Rollouts:
        return self

    async def __aexit__(self, *_: object) -> None:
        await _ended(self.under_way)

    def take(self, version: int) -> AsyncGenerator[Part]:
        """The parts of the step after `version`, an equal share of its prompts each, fewer groups when refills did not
        suffice; a part that has none is left out."""
        return self._ahead(version) if self.stage.max_staleness else self._on_policy(version)

    def state(self) -> dict[str, Any]:
        """JSON-able: the rows that were drawn from the stream and not learned from."""
        waiting = [self.drawn[number] for number in sorted(self.drawn)]
        return {"asked": self.asked, "again": [[source, index] for source, index, _ in [*waiting, *self.again]]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the same rows; they are sampled anew."""
        self.asked = int(state["asked"])
        self.again = [(source, index, self.context.rows(source)[index]) for source, index in state["again"]]

    # Staleness 0: all parts are under way at once.

    async def _on_policy(self, version: int) -> AsyncGenerator[Part]:
        parts = list[asyncio.Task[Part]]()
        for index in range(self.stage.updates_per_step):
            parts.append(asyncio.create_task(self._part(version, index, parts[-1] if parts else None)))
        done = list[Part]()
        try:
            for task in parts:
                part = await task
                done.append(replace(part, alone=task is parts[-1]))
                self._require_rewards(done)
                if part.kept:
                    yield done[-1]
            self._measure(done)
        finally:
            await _ended(parts)

    async def _part(self, version: int, index: int, before: asyncio.Task[Part] | None) -> Part:
        stage, kept, seen = self.stage, list[Group](), list[Group]()
        share = stage.prompts_per_step // stage.updates_per_step
        if before is not None and stage.refill_rounds:
            await asyncio.wait([before])  # prompts are drawn in one order, however long replies take
        for refill in range(stage.refill_rounds + 1):
            prompts = self._prompts(self.stream.take(share - len(kept)))
            groups = await self._together(prompts, self._sampling(version, index, refill))
            _require_version(groups, version)
            seen += await self._held_back(groups, version, index)
            kept = [group for group in seen if self._teaches(group)]
            if len(kept) >= share:
                break
        return Part(index, kept, seen)

    async def _together(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """The prompts' groups in order, scored; the next part may sample as soon as all are sampled."""
        async with self.sampling:
            sampled = [asyncio.create_task(self._sampled(prompt, sampling)) for prompt in prompts]
            scored = [asyncio.create_task(self._scored(task)) for task in sampled]
            try:
                await _all(sampled)
            except BaseException:
                await _ended([*sampled, *scored])
                raise
        try:
            return await _all(scored)
        finally:
            await _ended(scored)

    # Staleness above 0.

    async def _ahead(self, version: int) -> AsyncGenerator[Part]:
        stage, parts, taken = self.stage, list[Part](), 0
        share = stage.prompts_per_step // stage.updates_per_step
        lags, dropped = list[int](), 0
        for index in range(stage.updates_per_step):
            kept, seen = list[Group](), list[Group]()
            while len(kept) < share and len(seen) < share * (1 + stage.refill_rounds):
                self._ask((stage.max_staleness + 1) * stage.prompts_per_step - taken)
                group = await self._oldest()
                lag = version - min(v for rollout in group.rollouts for v in rollout.versions)
                if lag > stage.max_staleness:
                    dropped += 1
                    continue
                lags.append(lag)
                seen += await self._held_back([group], version, index)
                kept += [seen[-1]] if self._teaches(seen[-1]) else []
                # where groups are refilled, one that teaches nothing makes room for another
                taken += self._teaches(seen[-1]) or not stage.refill_rounds
            parts.append(Part(index, kept, seen))
            self._require_rewards(parts)
            if kept:
                yield parts[-1]
        self._measure(parts)
        self.metrics |= {
            "staleness": sum(lags) / len(lags),
            "staleness_max": float(max(lags)),
            "stale_dropped": float(dropped),
        }

    def _ask(self, limit: int) -> None:
        """Ask for groups until `limit` are under way or waiting to be taken."""
        while len(self.drawn) < limit:
            drawn = self.again.pop(0) if self.again else self.stream.take(1)[0]
            (prompt,) = self._prompts([drawn])
            self.under_way[asyncio.create_task(self._group(prompt, self._sampling(self.asked)))] = self.asked
            self.drawn[self.asked] = drawn
            self.asked += 1

    async def _oldest(self) -> Group:
        """Of the groups that are finished, the one asked for first; when there is none, the next to finish."""
        ready = [task for task in self.under_way if task.done()]
        if not ready and not self.finished:
            done, _ = await asyncio.wait(self.under_way, return_when=asyncio.FIRST_COMPLETED)
            ready = list(done)
        for task in ready:
            self.finished[self.under_way.pop(task)] = task.result()
        number = min(self.finished)
        del self.drawn[number]
        return self.finished.pop(number)

    # One group's way.

    def _prompts(self, drawn: Sequence[Drawn]) -> list[Prompt]:
        return as_prompts(drawn, self.context.tokenizer, True, self.context.recipe.chat)

    def _sampling(self, *place: int) -> Sampling:
        stage = self.stage
        seed = derive(self.context.recipe.seed, stage.name, "rollout", *place)
        return Sampling(stage.group_size, stage.temperature, stage.max_tokens, seed)

    async def _group(self, prompt: Prompt, sampling: Sampling) -> Group:
        return await self._scored(self._sampled(prompt, sampling))

    async def _sampled(self, prompt: Prompt, sampling: Sampling) -> Group:
        (group,) = await self.engine.generate([prompt], sampling)
        return group

    async def _scored(self, sampled: Awaitable[Group]) -> Group:
        stage = self.stage
        scored = await score([await sampled], stage.rewards, self.context.actors.rewards, self.judges)
        (group,) = scored if stage.overlong is None else punish_length(scored, stage.max_tokens, stage.overlong)
        return group

    async def _held_back(self, groups: list[Group], version: int, index: int) -> list[Group]:
        """The groups with what their divergence from the reference costs taken off their scores."""
        kl = self.stage.kl
        if kl is None or kl.place != "reward":
            return groups
        batch = pack(self.stage, self.context, groups, version, index)
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
        if not kept:
            raise RuntimeError(
                f"stage {self.stage.name!r}: none of {len(seen)} groups had rewards that vary, so there is nothing to "
                "learn from; use questions the model gets right sometimes (a difficulty filter), or larger groups"
            )
        rollouts = [rollout for group in seen for rollout in group.rollouts]
        self.examples = kept[:EXAMPLES]
        self.metrics = part_means(seen) | {
            "rollouts": float(len(rollouts)),
            "updates": float(sum(bool(part.kept) for part in parts)),
            "informative": len(kept) / len(seen),
            "reward_failures": failure_rate(seen),
            "tokens.mean": sum(len(r.token_ids) for r in rollouts) / len(rollouts),
            "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        }


async def _all(tasks: Sequence[asyncio.Task[Group]]) -> list[Group]:
    """All results in order, or the first error as soon as it is there."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    failed = next((task for task in tasks if task.done() and task.exception() is not None), None)
    return [failed.result()] if failed is not None else [task.result() for task in tasks]


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel what is still under way and wait until it is gone."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _require_version(groups: list[Group], version: int) -> None:
    """Every token must be of the policy the step starts from: its log-probabilities are the old ones."""
    found = {v for group in groups for rollout in group.rollouts for v in rollout.versions} - {version}
    if found:
        raise RuntimeError(f"the engine sampled with version {min(found)} where the step learns from version {version}")


def informative(group: Group) -> bool:
    """Whether the group's scored rewards differ: without a difference every advantage is 0."""
    values = {score.value for score in group.scores if score.outcome == "scored"}
    return len(values) > 1


def pack(stage: Rl, context: Context, groups: list[Group], version: int, index: int) -> Batch:
    """Optimizer step `index`: groups with their advantages, cut into ranks and micro-batches. Failed scores weigh 0."""
    samples = []
    advantages = estimator_of(stage).estimate([[score.value for score in group.scores] for group in groups])
    for place, (group, row) in enumerate(zip(groups, advantages, strict=True)):
        for i, (rollout, advantage) in enumerate(zip(group.rollouts, row, strict=True)):
            samples.append(
                Sample(
                    key=key(group, version, place, i),
                    token_ids=group.prompt_ids + rollout.token_ids,
                    prompt_length=len(group.prompt_ids),
                    media=group.prompt.media,
                    weight=float(group.scores[i].outcome == "scored"),
                    advantage=advantage,
                    logprobs=rollout.logprobs,
                    current=set(rollout.versions) == {version},
                )
            )
    return context.batch(samples, index)


def key(group: Group, version: int, place: int, rollout: int) -> str:
    """The name of a sample. Small data may bring a prompt twice into a step: `place` is its group's in the batch."""
    return f"{group.prompt.key}@{version}.{place}.{rollout}"
