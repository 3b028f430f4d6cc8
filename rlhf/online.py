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
from dataclasses import dataclass, field
from typing import TypeVar

from rlhf.algorithms.advantages import group_normalised
from rlhf.batching import make_batch
from rlhf.checkpoint import latest, resume, save
from rlhf.data.formatting import as_prompt
from rlhf.data.stream import Stream
from rlhf.evaluation import record
from rlhf.recipe import Rl
from rlhf.roles import Engine
from rlhf.scoring import Judge, failure_rate, part_means, score
from rlhf.stage import Context, derive
from rlhf.statistics import Totals, gap_metrics, merged
from rlhf.types import Batch, Group, Sample, Sampling, StepStats

Part = tuple[list[Group], list[Group]]  # (groups to learn from, all groups seen) of one update
T = TypeVar("T")
EXAMPLES = 4  # groups of a step that are kept for the report


async def run(stage: Rl, context: Context, engine: Engine, judges: Mapping[str, Judge]) -> dict[str, float]:
    """Improve the policy for `stage.steps` versions, from the latest checkpoint if there is one."""
    trainer, stream = context.actors.trainer, context.stream(stage.data, stage.name)
    rollouts = Rollouts(stage, context, engine, judges, stream)
    judge = next((name for name, part in stage.rewards.items() if part.judge is not None), None)
    checkpoints, totals = context.folder / "checkpoints", Totals()
    version = await resume(trainer, {"stream": stream, "totals": totals}, latest(checkpoints))
    await trainer.publish(engine, version)
    while version < stage.steps:
        clock, learned = Clock(), list[StepStats]()
        async with aclosing(rollouts.take(version)) as parts:
            async for groups in clock.waiting("rollout", parts):
                batch = pack(context, groups, version)
                with clock("train"):
                    learned.append(await trainer.step(batch, fresh=not learned))
        stats = merged(learned)
        sync = await trainer.publish(engine, version + 1)
        version += 1
        metrics = rollouts.metrics | dict(stats.metrics)
        totals.add(metrics, stats, sync)
        clock.seconds |= {"sync": sync.seconds, "proof": sync.proof_seconds}
        if version % stage.checkpoint_every == 0 and version < stage.steps:
            state = {"stream": stream.state(), "totals": totals.state()}
            clock.seconds["checkpoint"] = await save(trainer, checkpoints, version, state)
        context.log.log(version, metrics | gap_metrics(stats.gap) | dict(sync.metrics), clock.seconds)
        if version % max(stage.steps // 4, 1) == 0:
            context.log.rollouts(version, [record(group, 0, {}, version, judge) for group in rollouts.examples])
    return totals.metrics()


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
    sampling: asyncio.Lock = field(default_factory=asyncio.Lock)  # parts sample in turn: the first is soon there

    async def take(self, version: int) -> AsyncGenerator[list[Group]]:
        """The groups of each update after `version`, an equal part of prompts_per_step or fewer when refills did not
        suffice; a part that has none is left out. All parts are under way at once, in order."""
        parts = list[asyncio.Task[Part]]()
        for part in range(self.stage.updates_per_batch):
            parts.append(asyncio.create_task(self._part(version, part, parts[-1] if parts else None)))
        try:
            for task in parts:
                kept, _ = await task
                if kept:
                    yield kept
            self._measure([await task for task in parts])
        finally:
            for task in parts:
                task.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _part(self, version: int, part: int, before: asyncio.Task[Part] | None) -> Part:
        """Sample and score the groups of one update, in the order of `part`."""
        stage, kept, seen = self.stage, list[Group](), list[Group]()
        share = stage.prompts_per_step // stage.updates_per_batch
        for refill in range(stage.refill_rounds + 1):
            if refill and before is not None:
                await asyncio.wait([before])  # prompts are drawn in the same order however long replies take
            prompts = [
                as_prompt(row, source, index, self.context.tokenizer, True, self.context.recipe.chat)
                for source, index, row in self.stream.take(share - len(kept))
            ]
            seed = derive(self.context.recipe.seed, stage.name, "rollout", version, part, refill)
            async with self.sampling:
                sampled = await self.engine.generate(
                    prompts, Sampling(stage.group_size, stage.temperature, stage.max_tokens, seed)
                )
            scored = await score(sampled, stage.rewards, self.context.actors.rewards, self.judges)
            seen += scored
            kept += [group for group in scored if informative(group)]
            if len(kept) >= share:
                break
        return kept, seen

    def _measure(self, parts: list[Part]) -> None:
        kept, seen = ([group for part in parts for group in part[which]] for which in (0, 1))
        failed = failure_rate(seen)
        if failed > self.stage.max_failed_rewards:
            notes = [s.note for group in seen for s in group.scores if s.outcome != "scored"]
            raise RuntimeError(
                f"stage {self.stage.name!r}: rewards failed on {failed:.1%} of the rollouts of {len(seen)} prompts, "
                f"above max_failed_rewards = {self.stage.max_failed_rewards:g}. The last failure: {notes[-1]}"
            )
        if not kept:
            raise RuntimeError(
                f"stage {self.stage.name!r}: none of {len(seen)} groups had rewards that vary, so there is nothing to "
                "learn from; use questions the model gets right sometimes (a difficulty filter), or larger groups"
            )
        rollouts = [rollout for group in seen for rollout in group.rollouts]
        self.examples = kept[:EXAMPLES]
        self.metrics = part_means(seen) | {
            "rollouts": float(len(rollouts)),
            "informative": len(kept) / len(seen),
            "reward_failures": failed,
            "tokens.mean": sum(len(r.token_ids) for r in rollouts) / len(rollouts),
            "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        }


def informative(group: Group) -> bool:
    """Whether the group's scored rewards differ: without a difference every advantage is 0."""
    values = {score.value for score in group.scores if score.outcome == "scored"}
    return len(values) > 1


def pack(context: Context, groups: list[Group], version: int) -> Batch:
    """One update: groups with their advantages, cut into ranks and micro-batches. Failed scores weigh 0."""
    samples = []
    for group in groups:
        advantages = group_normalised([score.value for score in group.scores])
        for i, (rollout, advantage) in enumerate(zip(group.rollouts, advantages, strict=True)):
            samples.append(
                Sample(
                    key=f"{group.prompt.key}@{version}.{i}",
                    token_ids=group.prompt_ids + rollout.token_ids,
                    prompt_length=len(group.prompt_ids),
                    media=group.prompt.media,
                    weight=float(group.scores[i].outcome == "scored"),
                    advantage=advantage,
                    logprobs=rollout.logprobs,
                )
            )
    resources = context.recipe.resources
    return make_batch(samples, resources.trainer_ranks, resources.token_budget)


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
