"""The loop of reinforcement learning, on one screen.

A step learns from groups in as many parts as it has updates. On the policy (staleness 0) the engine samples what is
left of a step while the trainer learns from its first parts; above, it never waits for the trainer (`rlhf.rollouts`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import TypeVar

from rlhf.checkpoint import Restorable, latest, resume, save
from rlhf.evaluation import record
from rlhf.recipe import Rl
from rlhf.replay import groups_of
from rlhf.roles import Engine
from rlhf.rollouts import pack
from rlhf.scoring import Judge
from rlhf.stage import Context
from rlhf.statistics import Totals, gap_metrics, merged
from rlhf.types import StepStats

T = TypeVar("T")


async def run(stage: Rl, context: Context, engine: Engine | None, judges: Mapping[str, Judge]) -> dict[str, float]:
    """Improve the policy for `stage.steps` versions, from the latest checkpoint if there is one."""
    trainer, stream = context.actors.trainer, context.stream(stage)
    checkpoints, totals = context.folder / "checkpoints", Totals()
    judge = next((name for name, part in stage.rewards.items() if part.judge is not None), None)
    saving: dict[str, float] = {}  # of the step before: a line comes before its checkpoint, or a kill could lose it
    async with groups_of(stage, context, engine, judges, stream) as groups:
        lasting: dict[str, Restorable] = {"stream": stream, "rollouts": groups, "totals": totals}
        version = await resume(trainer, lasting, latest(checkpoints))
        while version < stage.steps:
            clock, learned = Clock(), list[StepStats]()
            with clock("sync"):
                await groups.renew(trainer, version)
            async with aclosing(groups.take(version)) as parts:
                async for part in clock.waiting("rollout", parts):
                    with clock("proof"):  # while the engine sampled; nothing is learned before
                        await groups.proven()
                    with clock("train"):
                        if part.alone:
                            await groups.rest()
                        batch = await pack(stage, context, part, version)
                        learned.append(await trainer.step(batch, fresh=not learned, alone=part.alone))
            sync = await groups.proven()
            version, stats = version + 1, merged(learned)
            metrics = groups.metrics | dict(stats.metrics)
            totals.add(metrics, stats, sync)
            context.log.log(version, metrics | gap_metrics(stats.gap) | dict(sync.metrics), clock.seconds | saving)
            saving = {}
            if version % max(stage.steps // 4, 1) == 0:
                context.log.rollouts(version, [record(group, 0, {}, version, judge) for group in groups.examples])
            if version < stage.steps and (version % stage.checkpoint_every == 0 or context.preemption.asked):
                state = {name: part.state() for name, part in lasting.items()}
                saving = {"checkpoint": await save(trainer, checkpoints, version, state)}
                context.preemption.leave(version)
    return totals.metrics()


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
