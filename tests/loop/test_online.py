"""What the loop of reinforcement learning does beside its arithmetic: parts of a step under way at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlhf.types import Batch, StepStats
from tests.loop.cast import FakeEngine, FakeRewards, FakeTrainer
from tests.loop.test_curriculum import recipe, run

STAGE = "stages.rl-verifiable"


def test_the_next_part_is_sampled_while_the_trainer_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, changed = {"generate": 0, "step": 0}, asyncio.Condition()
    begin, generate, step = FakeTrainer.begin, FakeEngine.generate, FakeTrainer.step

    async def beginning(trainer: FakeTrainer, *arguments: Any) -> Any:
        calls.update(generate=0, step=0)
        return await begin(trainer, *arguments)

    async def counted(engine: FakeEngine, prompts: Any, sampling: Any) -> Any:
        calls["generate"] += 1
        async with changed:
            changed.notify_all()
        return await generate(engine, prompts, sampling)

    async def patient(trainer: FakeTrainer, batch: Batch, fresh: bool = False) -> StepStats:
        calls["step"] += 1
        if trainer.begun[-1].loss.kind == "gspo":  # two parts a step: the first waits until the second is asked for
            async with changed:
                wanted = calls["step"] + calls["step"] % 2
                await asyncio.wait_for(changed.wait_for(lambda: calls["generate"] >= wanted), 10)
        return await step(trainer, batch, fresh)

    monkeypatch.setattr(FakeTrainer, "begin", beginning)
    monkeypatch.setattr(FakeEngine, "generate", counted)
    monkeypatch.setattr(FakeTrainer, "step", patient)
    run(recipe(f"{STAGE} = {{updates_per_batch = 2, steps = 3, evaluate = 'none'}}"), tmp_path, until="rl-verifiable")
    assert calls == {"generate": 6, "step": 6}


@pytest.mark.parametrize("part", [0, 1, 2])
def test_groups_are_the_same_however_long_scoring_takes(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, turns = FakeRewards.score, [0]

    async def slow(rewards: FakeRewards, function: str, groups: Any) -> Any:
        turns[0] += 1
        for _ in range(50 if turns[0] % 3 == part else 0):
            await asyncio.sleep(0)
        return await score(rewards, function, groups)

    only = f"{STAGE} = {{updates_per_batch = 2, refill_rounds = 2, group_size = 2, evaluate = 'none'}}"
    quick = run(recipe(only), tmp_path / "quick", until="rl-verifiable")
    monkeypatch.setattr(FakeRewards, "score", slow)
    delayed = run(recipe(only), tmp_path / "delayed", until="rl-verifiable")
    assert [keys(batch) for batch in quick.trainer.batches] == [keys(batch) for batch in delayed.trainer.batches]


def keys(batch: Batch) -> list[str]:
    return [s.key for update in batch.updates for rank in update.micro_batches for part in rank for s in part]
