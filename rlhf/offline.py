"""The loop of supervised stages: SFT, bridge pretraining, judge training."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from rlhf.checkpoint import latest, resume, save
from rlhf.data.formatting import as_sample
from rlhf.data.stream import Stream
from rlhf.recipe import Sft
from rlhf.stage import Context
from rlhf.types import Batch


async def run(stage: Sft, context: Context) -> dict[str, float]:
    """Train for `stage.steps` optimizer steps, from the latest checkpoint if there is one."""
    trainer, stream = context.actors.trainer, context.stream(stage.data, stage.name)
    checkpoints = context.folder / "checkpoints"
    step = await resume(trainer, {"stream": stream}, latest(checkpoints))
    batch = asyncio.create_task(asyncio.to_thread(_next_batch, stage, context, stream, step))
    last: Mapping[str, float] = {}
    saving: dict[str, float] = {}  # of the step before: a line comes before its checkpoint, or a kill could lose it
    try:
        while step < stage.steps:
            waited = time.perf_counter()
            ready, cursor = await batch
            if step + 1 < stage.steps:  # the next batch is made while the trainer works on this one
                batch = asyncio.create_task(asyncio.to_thread(_next_batch, stage, context, stream, step + 1))
            started = time.perf_counter()
            stats = await trainer.step(ready)
            step, last = step + 1, stats.metrics
            context.log.log(step, last, {"data": started - waited, "train": time.perf_counter() - started} | saving)
            saving = {}
            if step % stage.checkpoint_every == 0 and step < stage.steps:
                saving = {"checkpoint": await save(trainer, checkpoints, step, {"stream": cursor})}
    finally:
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
    return {f"train.{name}": value for name, value in last.items()}


def _next_batch(stage: Sft, context: Context, stream: Stream, step: int) -> tuple[Batch, Mapping[str, Any]]:
    """One batch, and the stream's position after it (the stream itself may already be ahead)."""
    samples = [
        as_sample(row, source, index, context.processor, None, context.recipe.chat)
        for source, index, row in stream.take(stage.batch_size)
    ]
    return context.batch(samples, step), stream.state()
