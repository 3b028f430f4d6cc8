"""What the loop of reinforcement learning does beside its arithmetic: parts of a step under way at once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest

from rlhf.roles import SyncError
from rlhf.rollouts import mark_stale, samples_of
from rlhf.types import Batch, Group, Prompt, Rollout, Score, StepStats
from tests.loop.cast import FakeCast, FakeEngine, FakeRewards, FakeTrainer, KilledError
from tests.loop.test_curriculum import recipe, run

NAME = "rl-verifiable"
STAGE = f"stages.{NAME}"


def improve(prepared: Path, folder: Path, settings: str, lost_at: int | None = None) -> FakeCast:
    shutil.copytree(prepared, folder)
    return go_on(folder, settings, lost_at)


def go_on(folder: Path, settings: str, lost_at: int | None = None) -> FakeCast:
    """The same in a folder that is there."""
    wanted = recipe(f"{STAGE} = {{updates_per_step = 2, evaluate = 'none'}}", f"{STAGE} = {{{settings}}}")
    return run(wanted, folder, until=NAME, lost_at=lost_at)


def test_the_next_part_is_sampled_while_the_trainer_learns(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, changed = {"generate": 0, "step": 0}, asyncio.Condition()
    share = share_of(2)
    begin, generate, step = FakeTrainer.begin, FakeEngine.generate, FakeTrainer.step

    async def beginning(trainer: FakeTrainer, *arguments: Any) -> Any:
        calls.update(generate=0, step=0)
        return await begin(trainer, *arguments)

    async def counted(engine: FakeEngine, prompts: Any, sampling: Any) -> Any:
        calls["generate"] += len(prompts)
        async with changed:
            changed.notify_all()
        return await generate(engine, prompts, sampling)

    async def patient(trainer: FakeTrainer, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        calls["step"] += 1
        if trainer.begun[-1].loss.kind != "nll":  # two parts a step: the first waits until the second is asked for
            assert alone == (calls["step"] % 2 == 0)  # beside its last update nothing is sampled
            async with changed:
                wanted = (calls["step"] + calls["step"] % 2) * share
                await asyncio.wait_for(changed.wait_for(lambda: calls["generate"] >= wanted), 10)
        return await step(trainer, batch, fresh)

    monkeypatch.setattr(FakeTrainer, "begin", beginning)
    monkeypatch.setattr(FakeEngine, "generate", counted)
    monkeypatch.setattr(FakeTrainer, "step", patient)
    improve(prepared, tmp_path / "run", "steps = 3")
    assert calls == {"generate": 6 * share, "step": 6}


@pytest.mark.parametrize("updates", [1, 2])
def test_engines_sleep_while_the_trainer_learns_alone(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    seen = list[tuple[bool, bool]]()
    step = FakeTrainer.step

    async def watched(trainer: FakeTrainer, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        seen.append((alone, trainer.engine.asleep))
        return await step(trainer, batch, fresh, alone)

    monkeypatch.setattr(FakeTrainer, "step", watched)
    improve(prepared, tmp_path / "run", f"steps = 2, updates_per_step = {updates}")
    assert seen == [(False, False), (True, True)][-updates:] * 2


def test_tokens_of_another_version_end_the_run(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = FakeTrainer.publish

    async def late(trainer: FakeTrainer, engine: Any, version: int) -> Any:
        return await publish(trainer, engine, version if version < 2 else version - 1)

    monkeypatch.setattr(FakeTrainer, "publish", late)
    with pytest.raises(RuntimeError, match="sampled with version 1 where the step learns from version 2"):
        improve(prepared, tmp_path / "run", "steps = 4")


def test_weights_are_proven_while_the_engine_samples_and_before_anything_is_learned(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, prove, step = FakeEngine.generate, FakeTrainer.prove, FakeTrainer.step
    sampling, proven = dict[int, asyncio.Event](), [-1]

    def begun(version: int) -> asyncio.Event:
        return sampling.setdefault(version, asyncio.Event())

    async def noted(engine: FakeEngine, prompts: Any, settings: Any) -> Any:
        begun(engine.version).set()
        return await generate(engine, prompts, settings)

    async def late(trainer: FakeTrainer, engine: Any, version: int) -> Any:
        await asyncio.wait_for(begun(version).wait(), 10)
        for _ in range(100):
            await asyncio.sleep(0)
        proven.append(version)
        return await prove(trainer, engine, version)

    async def learning(trainer: FakeTrainer, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        if trainer.begun[-1].loss.kind != "nll":
            assert proven[-1] == trainer.engine.version
        return await step(trainer, batch, fresh)

    monkeypatch.setattr(FakeEngine, "generate", noted)
    monkeypatch.setattr(FakeTrainer, "prove", late)
    monkeypatch.setattr(FakeTrainer, "step", learning)
    improve(prepared, tmp_path / "run", "steps = 3")
    assert proven == [-1, 0, 1, 2]


@pytest.mark.parametrize("staleness", [0, 2])
def test_nothing_is_learned_from_weights_that_did_not_arrive(
    staleness: int, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove, step, learned = FakeTrainer.prove, FakeTrainer.step, [0]

    async def wrong(trainer: FakeTrainer, engine: Any, version: int) -> Any:
        if version == 2:
            raise SyncError("version 2: layers.0.mlp")
        return await prove(trainer, engine, version)

    async def counted(trainer: FakeTrainer, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        learned[0] += trainer.begun[-1].loss.kind != "nll"
        return await step(trainer, batch, fresh)

    monkeypatch.setattr(FakeTrainer, "prove", wrong)
    monkeypatch.setattr(FakeTrainer, "step", counted)
    with pytest.raises(SyncError, match="version 2"):
        improve(prepared, tmp_path / "run", f"steps = 4, updates_per_step = 1, max_staleness = {staleness}")
    assert learned == [2]


@pytest.mark.parametrize("staleness", [0, 2])
def test_wrong_weights_are_named_even_where_their_replies_teach_nothing(
    staleness: int, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = FakeRewards.score

    async def late(trainer: FakeTrainer, engine: Any, version: int) -> Any:
        for _ in range(1000):
            await asyncio.sleep(0)
        raise SyncError("version 0: layers.0.mlp")

    async def level(rewards: FakeRewards, function: str, groups: Any, *options: Any) -> Any:
        return [[dataclasses.replace(s, value=0.0) for s in row] for row in await score(rewards, function, groups)]

    monkeypatch.setattr(FakeTrainer, "prove", late)
    monkeypatch.setattr(FakeRewards, "score", level)
    with pytest.raises(SyncError, match="version 0: layers"):
        improve(prepared, tmp_path / "run", f"steps = 2, refill_rounds = 0, max_staleness = {staleness}")


def test_groups_are_the_same_however_long_scoring_takes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, turns = FakeRewards.score, [0]
    settings = "updates_per_step = 4, refill_rounds = 2, group_size = 2"
    quick = improve(prepared, tmp_path / "quick", settings).trainer.batches
    for late in range(3):

        async def slow(rewards: FakeRewards, function: str, groups: Any, *options: Any, late: int = late) -> Any:
            turns[0] += 1
            for _ in range(50 if turns[0] % 3 == late else 0):
                await asyncio.sleep(0)
            return await score(rewards, function, groups)

        monkeypatch.setattr(FakeRewards, "score", slow)
        delayed = improve(prepared, tmp_path / f"late-{late}", settings).trainer.batches
        assert [keys(batch) for batch in delayed] == [keys(batch) for batch in quick]
        assert [batch.index for batch in delayed] == [batch.index for batch in quick]


def test_a_trainer_lost_between_updates_leaves_no_part_under_way(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "steps = 4, checkpoint_every = 2"
    whole = improve(prepared, tmp_path / "whole", settings)
    generate, running, left = FakeEngine.generate, [0], list[int]()

    async def slow(engine: FakeEngine, prompts: Any, sampling: Any) -> Any:
        running[0] += 1
        try:
            for _ in range(100):
                await asyncio.sleep(0)
            return await generate(engine, prompts, sampling)
        finally:
            running[0] -= 1

    async def renewed(cast: FakeCast) -> None:
        left.append(running[0])

    monkeypatch.setattr(FakeEngine, "generate", slow)
    monkeypatch.setattr(FakeCast, "renew_trainer", renewed)
    lost = improve(prepared, tmp_path / "lost", settings, lost_at=4)  # at the first update of step 3
    assert left == [0]
    assert lost.trainer.batches == whole.trainer.batches


def places_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The place of each prompt among those asked, by its key, as they come."""
    generate, places = FakeEngine.generate, dict[str, int]()

    async def noted(engine: FakeEngine, prompts: Any, sampling: Any) -> Any:
        for prompt in prompts:
            places.setdefault(prompt.key, len(places))
        return await generate(engine, prompts, sampling)

    monkeypatch.setattr(FakeEngine, "generate", noted)
    return places


def share_of(updates: int) -> int:
    return next(s.prompts_per_step for s in recipe().stages if s.name == NAME) // updates


def test_a_part_without_a_signal_keeps_its_place_in_the_schedule(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, places, share = FakeRewards.score, places_of(monkeypatch), share_of(2)

    async def level(rewards: FakeRewards, function: str, groups: Any, *options: Any) -> Any:
        scores = await score(rewards, function, groups)
        return [
            [dataclasses.replace(one, value=1.0) for one in row]
            if share <= places[group.prompt.key] < 2 * share  # the second part: nothing to choose between
            else row
            for group, row in zip(groups, scores, strict=True)
        ]

    monkeypatch.setattr(FakeRewards, "score", level)
    batches = improve(prepared, tmp_path / "run", "steps = 3, refill_rounds = 0").trainer.batches
    assert [batch.index for batch in batches] == [0, 2, 3, 4, 5]


def level_at(monkeypatch: pytest.MonkeyPatch, versions: Container[int]) -> None:
    """Rollouts of these versions are all worth the same, the others of a group not."""
    score = FakeRewards.score

    async def level(rewards: FakeRewards, function: str, groups: Any, *options: Any) -> Any:
        scores = await score(rewards, function, groups)
        return [
            [
                dataclasses.replace(found, value=1.0 if rollout.versions[0] in versions else float(place % 2))
                for place, (found, rollout) in enumerate(zip(row, group.rollouts, strict=True))
            ]
            for group, row in zip(groups, scores, strict=True)
        ]

    monkeypatch.setattr(FakeRewards, "score", level)


def test_a_step_without_a_signal_is_passed_over(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that is right about everything of a step has nothing to learn from it, and goes on."""
    level_at(monkeypatch, {1, 2})
    cast = improve(prepared, tmp_path / "run", "steps = 4, refill_rounds = 0")
    assert [batch.index for batch in cast.trainer.batches] == [0, 1, 6, 7]
    lines = (tmp_path / "run" / "stages" / "08-rl-verifiable" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"]["updates"] for line in lines] == [2.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("staleness", [0, 1])
def test_five_steps_without_a_signal_end_the_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staleness: int
) -> None:
    level_at(monkeypatch, range(1, 100))
    with pytest.raises(RuntimeError, match=r"in 5 steps of \d+ groups none had rewards"):
        improve(prepared, tmp_path / "run", f"steps = 9, refill_rounds = 0, max_staleness = {staleness}")
    lines = (tmp_path / "run" / "stages" / "08-rl-verifiable" / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 5 + staleness


def keys(batch: Batch) -> list[str]:
    return [sample.key for rank in batch.micro_batches for part in rank for sample in part]


def test_a_step_after_whose_checkpoint_nothing_is_heard_has_its_line(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = FakeTrainer.save, list[Path]()

    async def once(trainer: FakeTrainer, folder: Path) -> None:
        await save(trainer, folder)
        saved.append(folder)

    def dies(checkpoints: Path) -> None:
        if saved:
            raise KilledError

    monkeypatch.setattr(FakeTrainer, "save", once)
    monkeypatch.setattr("rlhf.checkpoint.prune", dies)  # the first thing after a checkpoint is whole
    with pytest.raises(KilledError):
        improve(prepared, tmp_path / "killed", "steps = 4, checkpoint_every = 2")
    monkeypatch.undo()
    run(recipe(f"{STAGE} = {{updates_per_step = 2, evaluate = 'none', steps = 4}}"), tmp_path / "killed", until=NAME)
    lines = (tmp_path / "killed" / "stages" / "08-rl-verifiable" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize(("algorithm", "kept"), [("reinforce++", 1.0), ("rloo", 0.5)])
def test_only_an_algorithm_that_compares_within_groups_drops_equal_ones(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, kept: float
) -> None:
    score, places = FakeRewards.score, places_of(monkeypatch)

    async def half(rewards: FakeRewards, function: str, groups: Any, *options: Any) -> Any:
        """Every second group has equal scores; the others do not."""
        scores = await score(rewards, function, groups)
        odd = [places[group.prompt.key] % 2 == 1 for group in groups]
        return [
            [dataclasses.replace(found, value=float(odd[g] and r % 2)) for r, found in enumerate(row)]
            for g, row in enumerate(scores)
        ]

    monkeypatch.setattr(FakeRewards, "score", half)
    cast = improve(prepared, tmp_path / "run", f"steps = 1, refill_rounds = 0, algorithm = '{algorithm}'")
    stage = next(s for s in recipe().stages if s.name == NAME)
    samples = [s for batch in cast.trainer.batches for part in batch.micro_batches[0] for s in part]
    assert len(samples) == stage.prompts_per_step * stage.group_size * kept
    assert all(sample.advantage != 0 for sample in samples)
    assert {spec.loss.kind for spec in cast.trainer.begun} == {{"rloo": "reinforce", "reinforce++": "ppo"}[algorithm]}


def test_a_critic_tells_the_tokens_of_a_rollout_apart(prepared: Path, tmp_path: Path) -> None:
    """Groups of one: the critic says ½ before each token, so with smoothing 1 every return is the rollout's score."""
    settings = "algorithm = 'ppo', steps = 2, group_size = 1, critic = {smoothing = 1.0, lr = 3e-4}"
    cast = improve(prepared, tmp_path / "run", settings)
    assert cast.trainer.begun[-1].critic == 3e-4
    assert cast.trainer.begun[-1].loss.kind == "ppo"
    for batch in cast.trainer.batches[-4:]:
        samples = [sample for part in batch.micro_batches[0] for sample in part]
        assert len({sample.returns for sample in samples}) > 1
        for sample in samples:
            assert min(abs(sample.returns[0] - score) for score in (0, 0.1, 0.9, 1)) < 1e-6
            assert len(set(sample.returns)) == 1
            assert len(sample.returns) == len(sample.advantages) == sample.num_completion
        tokens = [advantage for sample in samples for advantage in sample.advantages]
        assert sum(tokens) == pytest.approx(0.0, abs=1e-6)


class Uneven:
    """An engine in which every fifth group takes until `late` others are there, or in the last step nothing else is
    under way. Tokens keep the version their group began with; with `mixed` a group's first reply takes on the present
    one halfway."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: int, steps: int, mixed: bool = False) -> None:
        self.late, self.steps, self.mixed = late, steps, mixed
        self.begun = self.ended = self.slow = self.most = 0
        generate = FakeEngine.generate

        async def slow(engine: FakeEngine, prompts: Any, sampling: Any) -> Any:
            number, version = self.begun, engine.version
            self.begun += 1
            self.most = max(self.most, self.begun - self.ended)
            groups = await generate(engine, prompts, sampling)
            if number % 5 == 0:
                self.slow += 1
                await asyncio.wait_for(self._late(engine, number), 20)
                self.slow -= 1
            else:
                await asyncio.sleep(0)
            self.ended += 1
            return [self._dated(group, version, engine.version) for group in groups]

        monkeypatch.setattr(FakeEngine, "generate", slow)

    async def _late(self, engine: FakeEngine, number: int) -> None:
        def alone() -> bool:
            return engine.version == self.steps - 1 and self.begun - self.ended == self.slow

        while self.ended < number + self.late and not alone():  # noqa: ASYNC110 - nobody tells when versions change
            await asyncio.sleep(0)

    def _dated(self, group: Any, first: int, last: int) -> Any:
        def versions(place: int, count: int) -> tuple[int, ...]:
            half = count // 2 if self.mixed and place == 0 else count
            return (first,) * half + (last,) * (count - half)

        rollouts = [dataclasses.replace(r, versions=versions(i, len(r.versions))) for i, r in enumerate(group.rollouts)]
        return dataclasses.replace(group, rollouts=tuple(rollouts))


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "stages" / "08-rl-verifiable" / "steps.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_slow_groups_hold_nobody_up_and_are_at_most_so_stale(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With groups that take longer than a step's share of others: on the policy this would wait for ever."""
    engine = Uneven(monkeypatch, late=12, steps=8, mixed=True)
    settings = "steps = 8, prompts_per_step = 4, refill_rounds = 0, max_staleness = 2"
    cast = improve(prepared, tmp_path / "run", settings)
    assert len(cast.trainer.batches) == 16
    found = [line["metrics"] for line in lines(tmp_path / "run")]
    assert found[0]["staleness_max"] == 0
    assert max(line["staleness_max"] for line in found) <= 2
    assert max(line["staleness"] for line in found) > 0
    assert engine.most <= 2.5 * 4


def test_updates_may_take_groups_as_they_are_finished(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of four groups ends after the others: the second update learns from it, and the policy sampled it."""
    places, step, resting = places_of(monkeypatch), FakeTrainer.step, list[bool]()
    Uneven(monkeypatch, late=3, steps=1)

    async def seen(trainer: FakeTrainer, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        resting.append(alone)
        return await step(trainer, batch, fresh, alone)

    monkeypatch.setattr(FakeTrainer, "step", seen)
    settings = "steps = 1, prompts_per_step = 4, refill_rounds = 0, group_size = 2, algorithm = 'reinforce++'"
    first, second = improve(prepared, tmp_path / "run", settings + ", in_order = false").trainer.batches
    asked = [{places[key.split("@")[0]] for key in keys(batch)} for batch in (first, second)]
    assert 0 not in asked[0]
    assert asked[0] | asked[1] == {0, 1, 2, 3}
    assert all(sample.current for batch in (first, second) for part in batch.micro_batches[0] for sample in part)
    assert resting == [False, True]


def test_a_group_too_stale_is_dropped_and_counted(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Uneven(monkeypatch, late=12, steps=8)
    settings = "steps = 8, prompts_per_step = 4, refill_rounds = 0, max_staleness = 1, group_size = 2"
    cast = improve(prepared, tmp_path / "run", settings + ", algorithm = 'reinforce++'")
    found = [line["metrics"] for line in lines(tmp_path / "run")]
    assert sum(line["stale_dropped"] for line in found) > 0
    assert max(line["staleness_max"] for line in found) <= 1
    # every update still learns from as many groups, and the last step asks for no more than it needs
    assert {len(keys(batch)) for batch in cast.trainer.batches} == {2 * 2}


@pytest.mark.parametrize("algorithm", ["reinforce++", "ppo"])
def test_tokens_too_stale_are_context_for_the_rest_of_their_reply(
    algorithm: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a slow group one reply began too long ago and ended under weights that are fresh, the other is all too old."""
    Uneven(monkeypatch, late=12, steps=8, mixed=True)
    settings = "steps = 8, prompts_per_step = 4, refill_rounds = 0, max_staleness = 1, group_size = 2"
    cast = improve(prepared, tmp_path / "run", settings + f", algorithm = '{algorithm}'")
    found = [line["metrics"] for line in lines(tmp_path / "run")]
    stale = sum(line["stale_tokens"] for line in found)
    assert stale > 0
    assert max(line["staleness_max"] for line in found) <= 1
    sampled = sum(line["tokens.mean"] * line["rollouts"] for line in found)
    assert sum(batch.num_tokens for batch in cast.trainer.batches) == pytest.approx(sampled - stale)


def test_a_sample_starts_where_its_tokens_are_fresh() -> None:
    prompt = Prompt("data/1", "data", "?", (1, 2))
    rollouts = (
        Rollout((5, 6, 7), (-0.1, -0.2, -0.3), (3, 4, 5), "new", "stop"),
        Rollout((8,), (-0.4,), (3,), "old", "stop"),
    )
    group = Group(prompt, (1, 9, 2), rollouts, (Score("scored", 1.0), Score("scored", 0.0)))
    late, gone = samples_of([mark_stale(group, 4)], 5)
    assert (late.token_ids, late.prompt_length, late.logprobs) == ((1, 9, 2, 5, 6, 7), 4, (-0.2, -0.3))
    assert gone.num_completion == 0
    whole, _ = samples_of([mark_stale(group, 3)], 5)
    assert (whole.prompt_length, whole.logprobs) == (3, (-0.1, -0.2, -0.3))


def test_only_tokens_of_the_present_weights_are_compared(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "steps = 3, prompts_per_step = 4, refill_rounds = 0, max_staleness = 1, algorithm = 'reinforce++'"
    cast = improve(prepared, tmp_path / "run", settings)
    by_step = [[s for part in batch.micro_batches[0] for s in part] for batch in cast.trainer.batches]
    assert all(sample.current for sample in by_step[0])
    assert not all(sample.current for samples in by_step[2:] for sample in samples)


def test_rows_under_way_at_a_kill_are_asked_again(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "steps = 4, prompts_per_step = 4, refill_rounds = 0, max_staleness = 1, checkpoint_every = 2, "
        "algorithm = 'reinforce++'"
    )
    straight = improve(prepared, tmp_path / "straight", settings).trainer.batches
    killed = improve(prepared, tmp_path / "lost", settings, lost_at=6).trainer.batches  # in step 4, after a checkpoint

    def prompts(batches: list[Batch]) -> list[str]:
        return sorted({key.split("@")[0] for batch in batches for key in keys(batch)})

    # two steps twice: the same rows, none left out
    assert [b.index for b in killed] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert prompts(killed[6:]) == prompts(straight[4:])


def test_length_is_punished_before_rollouts_are_compared(prepared: Path, tmp_path: Path) -> None:
    settings = "steps = 1, refill_rounds = 0, max_tokens = 16, overlong = 15"
    improve(prepared, tmp_path / "run", settings)
    line = (tmp_path / "run" / "stages" / "08-rl-verifiable" / "steps.jsonl").read_text().splitlines()[0]
    metrics = json.loads(line)["metrics"]
    assert -1 <= metrics["reward.overlong"] < 0
    parts = sum(metrics[f"reward.{name}"] * weight for name, weight in (("answer", 0.9), ("format", 0.1)))
    assert metrics["reward"] == pytest.approx(parts + metrics["reward.overlong"])


def test_a_divergence_is_taken_off_the_reward_before_rollouts_are_compared(prepared: Path, tmp_path: Path) -> None:
    kl = "kl = {weight = 0.01, place = 'reward'}"
    cast = improve(prepared, tmp_path / "run", f"steps = 1, refill_rounds = 0, {kl}")
    assert cast.trainer.begun[-1].reference
    assert cast.trainer.begun[-1].loss.kl is None
    line = (tmp_path / "run" / "stages" / "08-rl-verifiable" / "steps.jsonl").read_text().splitlines()[0]
    metrics = json.loads(line)["metrics"]
    assert metrics["reward.kl"] == pytest.approx(-0.01 * metrics["tokens.mean"])
    samples = [s for batch in cast.trainer.batches for part in batch.micro_batches[0] for s in part]
    assert len({sample.key for sample in samples}) == len(samples)


def test_groups_that_wait_ahead_are_held_to_the_reference_together(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge, rows = FakeTrainer.divergences, list[int]()

    async def counted(trainer: FakeTrainer, batch: Batch, estimator: str) -> Any:
        rows.append(batch.num_rows)
        return await diverge(trainer, batch, estimator)

    monkeypatch.setattr(FakeTrainer, "divergences", counted)
    kl = "kl = {weight = 0.01, place = 'reward'}"
    settings = f"steps = 4, updates_per_step = 1, group_size = 2, refill_rounds = 0, max_staleness = 1, {kl}"
    improve(prepared, tmp_path / "run", settings)
    lines = (tmp_path / "run" / "stages" / "08-rl-verifiable" / "steps.jsonl").read_text().splitlines()
    for metrics in (json.loads(line)["metrics"] for line in lines):
        assert metrics["reward.kl"] == pytest.approx(-0.01 * metrics["tokens.mean"])
    assert sum(rows) == 4 * 2 * share_of(1)
    assert len(rows) < 4 * share_of(1)


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_engine_that_fails_ends_the_stage_by_its_own_error(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staleness: int
) -> None:
    generate, asked = FakeEngine.generate, [0]

    async def fails(engine: FakeEngine, prompts: Any, sampling: Any) -> Any:
        asked[0] += 1
        if asked[0] == 9:
            raise ValueError("prompt 'x': 2 placeholders for 1 image")
        return await generate(engine, prompts, sampling)

    monkeypatch.setattr(FakeEngine, "generate", fails)
    settings = f"steps = 4, prompts_per_step = 4, refill_rounds = 0, max_staleness = {staleness}"
    with pytest.raises(ValueError, match="prompt 'x'"):
        improve(prepared, tmp_path / "run", settings)


@pytest.mark.parametrize("how", ["max_staleness = 1", "in_order = false"])
def test_refills_make_up_for_groups_that_teach_nothing(
    how: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, places = FakeRewards.score, places_of(monkeypatch)

    async def half(rewards: FakeRewards, function: str, groups: Any, *options: Any) -> Any:
        scores = await score(rewards, function, groups)
        return [
            [dataclasses.replace(one, value=float(places[g.prompt.key] % 2 and r % 2)) for r, one in enumerate(row)]
            for g, row in zip(groups, scores, strict=True)
        ]

    monkeypatch.setattr(FakeRewards, "score", half)
    settings = f"steps = 2, prompts_per_step = 4, group_size = 2, evaluate = 'none', refill_rounds = 8, {how}"
    cast = improve(prepared, tmp_path / "run", settings)
    assert {len(keys(batch)) for batch in cast.trainer.batches} == {2 * 2}
    found = [line["metrics"] for line in lines(tmp_path / "run")]
    assert all(line["informative"] < 1 for line in found)
    if "in_order" in how:  # nothing was left over of a step
        assert 2 * len(cast.engine.asked) == sum(line["rollouts"] for line in found)


@pytest.mark.parametrize(("updates", "teaching"), [(1, {0}), (2, {0, 4, 5, 6})])
def test_a_step_on_the_policy_leaves_nothing_over_where_refills_do_not_suffice(
    updates: int, teaching: set[int], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, places = FakeRewards.score, places_of(monkeypatch)

    async def few(rewards: FakeRewards, function: str, groups: Any, *options: Any) -> Any:
        scores = await score(rewards, function, groups)
        return [
            [dataclasses.replace(one, value=float(places[g.prompt.key] in teaching and r)) for r, one in enumerate(row)]
            for g, row in zip(groups, scores, strict=True)
        ]

    monkeypatch.setattr(FakeRewards, "score", few)
    settings = f"steps = 1, prompts_per_step = 4, updates_per_step = {updates}, group_size = 2, refill_rounds = 1"
    cast = improve(prepared, tmp_path / "run", settings + ", evaluate = 'none', in_order = false")
    (line,) = lines(tmp_path / "run")
    assert 2 * len(cast.engine.asked) == line["metrics"]["rollouts"]
