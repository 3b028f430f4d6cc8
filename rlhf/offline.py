"""The loop of stages that learn from rows: SFT, bridge pretraining, judge training, preferences, reward models."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf import preference, reward_model
from rlhf.checkpoint import latest, resume, save
from rlhf.data.formatting import as_pair, as_sample
from rlhf.data.stream import Draw
from rlhf.recipe import Pairs, Preference, RewardModel, Sft
from rlhf.roles import Trainer
from rlhf.search import RateSearch, Verdict
from rlhf.stage import Context
from rlhf.types import Batch, Sample

STEP = ("tokens", "lr", "grad_norm", "entropy")


async def run(stage: Sft | Pairs, context: Context) -> dict[str, float]:
    """Train for `stage.steps` optimizer steps, from the latest checkpoint if there is one."""
    trainer, stream = context.actors.trainer, context.stream(stage)
    checkpoints = context.folder / "checkpoints"
    search = RateSearch(stage.search if isinstance(stage, Sft) else None, stage.steps)
    step = await resume(trainer, {"stream": stream, "search": search}, latest(checkpoints))
    batch = asyncio.create_task(asyncio.to_thread(_next_batch, stage, context, stream, step))
    last: Mapping[str, float] = {}
    saving: dict[str, float] = {}  # of the step before: a line comes before its checkpoint, or a kill could lose it
    held: list[tuple[int, Mapping[str, float], dict[str, float]]] = []  # lines of a trial, which may be taken back
    try:
        while step < stage.steps:
            waited = time.perf_counter()
            ready, cursor = await batch
            if step + 1 < stage.steps:  # the next batch is made while the trainer works on this one
                batch = asyncio.create_task(asyncio.to_thread(_next_batch, stage, context, stream, step + 1))
            started = time.perf_counter()
            try:
                last = await _learn(stage, trainer, replace(ready, scale=search.scale))
            except FloatingPointError:
                if search.before is None:
                    raise
                last = {"loss": math.inf}  # at a rate that is only tried
            step += 1
            held.append((step, last, {"data": started - waited, "train": time.perf_counter() - started} | saving))
            saving, verdict = {}, search.saw(step, last["loss"])
            if verdict is Verdict.UNDECIDED:
                context.preemption.leave(step, "; the trial of its learning rate begins again")
                continue
            if verdict is Verdict.GO_BACK:
                await batch  # it moves the stream, too
                step = await resume(trainer, {"stream": stream}, latest(checkpoints))
                batch = asyncio.create_task(asyncio.to_thread(_next_batch, stage, context, stream, step))
                held.clear()
                continue
            for line in held:
                context.log.log(*line)
            held.clear()
            due = step % stage.checkpoint_every == 0 or context.preemption.asked
            if verdict is Verdict.TRY or (due and step < stage.steps):
                state = {"stream": cursor, "search": search.state()}
                saving = {"checkpoint": await save(trainer, checkpoints, step, state)}
                context.preemption.leave(step)
    finally:
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
    return {f"train.{name}": value for name, value in last.items()}


async def _learn(stage: Sft | Pairs, trainer: Trainer, batch: Batch) -> Mapping[str, float]:
    """One optimizer step; its metrics."""
    if isinstance(stage, Preference):
        weighed, pairs = await preference.weigh(stage, trainer, batch)
    elif isinstance(stage, RewardModel):
        weighed, pairs = await reward_model.weigh(stage, trainer, batch)
    else:
        return (await trainer.step(batch)).metrics
    metrics = (await trainer.step(weighed)).metrics
    # of the weighted sum itself only what says how the step went
    return {name: value for name, value in metrics.items() if name in STEP or name.startswith("router")} | pairs


def weighed(
    samples: Sequence[Sample], sources: Sequence[str], weights: Mapping[str, float], normalise: str
) -> list[Sample]:
    """The samples with weights by which a step's gradient is Σ_m λ_m ∇ mean loss of source m, λ being `weights`, though
    the batch divides by all its tokens ("token") or rows ("row")."""
    counts = [sample.num_learned if normalise == "token" else 1 for sample in samples]
    total, own = sum(counts), Counter[str]()
    for source, count in zip(sources, counts, strict=True):
        own[source] += count
    return [replace(s, weight=weights[m] * total / own[m]) for s, m in zip(samples, sources, strict=True)]


def _next_batch(stage: Sft | Pairs, context: Context, stream: Draw, step: int) -> tuple[Batch, Mapping[str, Any]]:
    """One batch, and the stream's position after it (the stream itself may already be ahead)."""
    drawn, chat, samples = stream.take(stage.batch_size), context.recipe.chat, list[Sample]()
    for source, index, row in drawn:
        if isinstance(stage, Preference):
            samples += as_pair(row, source, index, context.processor, chat)
        elif isinstance(stage, RewardModel):
            samples += reward_model.as_ranked(row, source, index, context.processor, chat)
        else:
            samples.append(as_sample(row, source, index, context.processor, None, chat))
    if isinstance(stage, Sft) and stage.mix == "loss":
        samples = weighed(samples, [source for source, _, _ in drawn], stage.data, stage.normalise)
    return context.batch(samples, step), stream.state()
