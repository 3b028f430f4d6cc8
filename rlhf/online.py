"""The loop of reinforcement learning, on one screen.

Staleness 0: the groups of a step are sampled by the weights that were published last. A step of several updates takes
its prompts in as many parts: while the trainer learns from one, the engine samples the next.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from rlhf.algorithms.shaping import changed, punish_length
from rlhf.algorithms.table import estimator_of
from rlhf.checkpoint import latest, resume, save
from rlhf.data.formatting import as_prompts
from rlhf.data.stream import Stream
from rlhf.evaluation import record
from rlhf.recipe import Rl
from rlhf.roles import Engine
from rlhf.scoring import Judge, failure_rate, part_means, score
from rlhf.stage import Context, derive
from rlhf.statistics import Totals, gap_metrics, merged
from rlhf.types import Batch, Group, Sample, Sampling, StepStats

T = TypeVar("T")
EXAMPLES = 4  # groups of a step that are kept for the report


async def run(stage: Rl, context: Context, engine: Engine, judges: Mapping[str, Judge]) -> dict[str, float]:
    """Improve the policy for `stage.steps` versions, from the latest checkpoint if there is one."""
    trainer, stream = context.actors.trainer, context.stream(stage.data, stage.name)
    rollouts = Rollouts(stage, context, engine, judges, stream)
    judge = next((name for name, part in stage.rewards.items() if part.judge is not None), None)
    checkpoints, totals = context.folder / "checkpoints", Totals()
    saving: dict[str, float] = {}  # of the step before: a line comes before its checkpoint, or a kill could lose it
    version = await resume(trainer, {"stream": stream, "totals": totals}, latest(checkpoints))
    await trainer.publish(engine, version)
    while version < stage.steps:
        clock, learned = Clock(), list[StepStats]()
        async with aclosing(rollouts.take(version)) as parts:
            async for part in clock.waiting("rollout", parts):
                batch = pack(stage, context, part.kept, version, version * stage.updates_per_step + part.index)
                with clock("train"):
                    learned.append(await trainer.step(batch, fresh=not learned))
        stats = merged(learned)
        sync = await trainer.publish(engine, version + 1)
        version += 1
        metrics = rollouts.metrics | dict(stats.metrics)
        totals.add(metrics, stats, sync)
        clock.seconds |= {"sync": sync.seconds, "proof": sync.proof_seconds}
        context.log.log(version, metrics | gap_metrics(stats.gap) | dict(sync.metrics), clock.seconds | saving)
        saving = {}
        if version % stage.checkpoint_every == 0 and version < stage.steps:
            state = {"stream": stream.state(), "totals": totals.state()}
            saving = {"checkpoint": await save(trainer, checkpoints, version, state)}
        if version % max(stage.steps // 4, 1) == 0:
            context.log.rollouts(version, [record(group, 0, {}, version, judge) for group in rollouts.examples])
    return totals.metrics()


@dataclass(frozen=True)
class Part:
    """What one update of a step learns from: the groups `kept` of those `seen`."""

    index: int
    kept: list[Group]
    seen: list[Group]


@dataclass
class Rollouts:
    """Groups worth learning from: sampled, scored, and refilled when their rewards do not vary (DAPO §3.2)."""

    stage: Rl
    context: Context
    engine: Engine
    judges: Mapping[str, Judge]
    stream: Stream
    metrics: dict[str, float] = field(default_factory=dict)
    examples: list[Group] = field(default_factory=list)
    alone: bool = field(init=False)  # groups are compared within themselves alone
    # parts take turns in the engine, so that the first is soon there, and with the rewards, so that it always is
    sampling: asyncio.Lock = field(default_factory=asyncio.Lock)
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.alone = estimator_of(self.stage).within_groups

    async def take(self, version: int) -> AsyncGenerator[Part]:
        """The parts of the step after `version`, an equal share of its prompts each, fewer groups when refills did not
        suffice; a part that has none is left out. All are under way at once."""
        parts = list[asyncio.Task[Part]]()
        for index in range(self.stage.updates_per_step):
            parts.append(asyncio.create_task(self._part(version, index, parts[-1] if parts else None)))
        done = list[Part]()
        try:
            for task in parts:
                done.append(await task)
                self._require_rewards(done)
                if done[-1].kept:
                    yield done[-1]
            self._measure(done)
        finally:
            for task in parts:
                task.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _part(self, version: int, index: int, before: asyncio.Task[Part] | None) -> Part:
        stage, kept, seen = self.stage, list[Group](), list[Group]()
        share = stage.prompts_per_step // stage.updates_per_step
        if before is not None and stage.refill_rounds:
            await asyncio.wait([before])  # prompts are drawn in one order, however long replies take
        for refill in range(stage.refill_rounds + 1):
            drawn = self.stream.take(share - len(kept))
            prompts = as_prompts(drawn, self.context.tokenizer, True, self.context.recipe.chat)
            seed = derive(self.context.recipe.seed, stage.name, "rollout", version, index, refill)
            async with self.sampling:
                sampled = await self.engine.generate(
                    prompts, Sampling(stage.group_size, stage.temperature, stage.max_tokens, seed)
                )
            _require_version(sampled, version)
            async with self.scoring:
                scored = await score(sampled, stage.rewards, self.context.actors.rewards, self.judges)
            if stage.overlong is not None:
                scored = punish_length(scored, stage.max_tokens, stage.overlong)
            scored = await self._held_back(scored, version, index)
            seen += scored
            kept += [group for group in scored if not self.alone or informative(group)]
            if len(kept) >= share:
                break
        return Part(index, kept, seen)

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
                )
            )
    return context.batch(samples, index)


def key(group: Group, version: int, place: int, rollout: int) -> str:
    """The name of a sample. Small data may bring a prompt twice into a step: `place` is its group's in the batch."""
    return f"{group.prompt.key}@{version}.{place}.{rollout}"


class Clock:
    """Seconds by phase of one step; "rollout": those that the trainer waits."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    async def waiting(self, phase: str, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """The same items; the time they take to come counts as `phase`."""
        while True:
            with self(phase):
                item = await anext(items, None)
            if item is None:
                return
            yield item
