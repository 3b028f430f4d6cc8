"""The loop of reinforcement learning, on one screen.

Staleness 0: the groups of a step are sampled by the very weights the step improves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

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
from rlhf.statistics import Totals, gap_metrics
from rlhf.types import Batch, Group, Sample, Sampling


async def run(stage: Rl, context: Context, engine: Engine, judges: Mapping[str, Judge]) -> dict[str, float]:
    """Improve the policy for `stage.steps` versions, from the latest checkpoint if there is one."""
    trainer, stream = context.actors.trainer, context.stream(stage.data, stage.name)
    rollouts = Rollouts(stage, context, engine, judges, stream)
    judge = next((name for name, part in stage.rewards.items() if part.judge is not None), None)
    checkpoints, totals = context.folder / "checkpoints", Totals()
    version = await resume(trainer, {"stream": stream, "totals": totals}, latest(checkpoints))
    await trainer.publish(engine, version)
    while version < stage.steps:
        clock = Clock()
        with clock("rollout"):
            groups = await rollouts.take(version)
        batch = pack(stage, context, groups, version)
        with clock("train"):
            stats = await trainer.step(batch)
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
            context.log.rollouts(version, [record(group, 0, {}, version, judge) for group in groups[:4]])
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

    async def take(self, version: int) -> list[Group]:
        """The groups of the step after `version`: at most prompts_per_step, fewer when refills did not suffice."""
        stage, kept, seen = self.stage, list[Group](), list[Group]()
        for refill in range(stage.refill_rounds + 1):
            wanted = stage.prompts_per_step - len(kept)
            prompts = [
                as_prompt(row, source, index, self.context.tokenizer, True, self.context.recipe.chat)
                for source, index, row in self.stream.take(wanted)
            ]
            seed = derive(self.context.recipe.seed, stage.name, "rollout", version, refill)
            sampled = await self.engine.generate(
                prompts, Sampling(stage.group_size, stage.temperature, stage.max_tokens, seed)
            )
            scored = await score(sampled, stage.rewards, self.context.actors.rewards, self.judges)
            seen += scored
            kept += [group for group in scored if informative(group)]
            if len(kept) >= stage.prompts_per_step:
                break
        self._measure(seen, kept)
        return kept

    def _measure(self, seen: list[Group], kept: list[Group]) -> None:
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


def pack(stage: Rl, context: Context, groups: list[Group], version: int) -> Batch:
    """Groups with their advantages, cut into optimizer steps, ranks and micro-batches. Failed scores weigh 0."""
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
    seed = derive(context.recipe.seed, stage.name, "batch", version)
    return make_batch(samples, stage.updates_per_batch, resources.trainer_ranks, resources.token_budget, seed)


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started
