"""Runs that are asked to stop, in every kind of stage: with a checkpoint, and then to the same end as any other."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.preemption import PreemptedError, Preemption
from rlhf.recipe import Recipe
from rlhf.report.page import ENDS
from rlhf.roles import ActorLostError
from tests.loop.cast import FakeCast, FakeEngine, FakeTrainer
from tests.loop.test_curriculum import SEARCHED, recipe, run, summary
from tests.loop.test_online import NAME, STAGE

Asking = Callable[[Preemption, pytest.MonkeyPatch], None]


def asked_at(
    kind: type, call: str, number: int, reason: str = "SIGTERM", also: Callable[[], None] | None = None
) -> Asking:
    """Ask in the `number`th of these calls of a fake, before it is answered."""

    def arrange(preemption: Preemption, patch: pytest.MonkeyPatch) -> None:
        plain, calls = getattr(kind, call), [0]

        async def asking(self: Any, *arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                preemption.ask(reason)
                if also is not None:
                    also()
                await asyncio.sleep(0)  # where a run that is not waited for is cancelled
            return await plain(self, *arguments, **named)

        patch.setattr(kind, call, asking)

    return arrange


def preempted(wanted: Recipe, folder: Path, until: str, asking: Asking) -> str:
    """Run until it is asked to stop; what it said."""
    preemption = Preemption(grace=100.0)
    with preemption, pytest.MonkeyPatch.context() as patch:
        asking(preemption, patch)
        with pytest.raises((PreemptedError, asyncio.CancelledError)) as ended:
            run(wanted, folder, until=until, preemption=preemption)
    found = summary(folder)
    assert (found["status"], found["error"]) == ("preempted", "SIGTERM")
    return str(ended.value) if isinstance(ended.value, PreemptedError) else preemption.cancelled


def results(folder: Path) -> list[dict[str, Any]]:
    """Of every stage all that does not tell how long something took."""
    return [
        {key: stage[key] for key in ("name", "status", "artifact")}
        | {"metrics": untimed(stage["metrics"]), "steps": steps(folder, stage["name"])}
        for stage in summary(folder)["stages"]
    ]


def steps(folder: Path, stage: str) -> list[tuple[int, dict[str, float]]]:
    path = next(folder.glob(f"stages/*-{stage}")) / "steps.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], untimed(line["metrics"])) for line in found]


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "scoring_lag" not in name and "seconds" not in name}


def same(wanted: Recipe, prepared: Path, tmp_path: Path, until: str, asking: Asking) -> tuple[str, FakeCast]:
    """A run that is asked to stop, and goes on, comes to the results of one that is not; what it said, and the cast
    that went on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        shutil.copytree(prepared, folder)
    run(wanted, whole, until=until)
    said = preempted(wanted, stopped, until, asking)
    again = run(wanted, stopped, until=until)
    assert results(stopped) == results(whole)
    return said, again


def test_supervised_training_goes_on_after_its_step(prepared: Path, tmp_path: Path) -> None:
    wanted = recipe("stages.language = { steps = 6, checkpoint_every = 4 }")
    said, again = same(wanted, prepared, tmp_path, "language", asked_at(FakeTrainer, "step", 3))
    assert said == "preempted (SIGTERM) at step 3 of stage 'language'"
    assert [batch.index for batch in again.trainer.batches] == [3, 4, 5]


@pytest.mark.parametrize("updates", [1, 2])
def test_reinforcement_learning_goes_on_after_its_step(prepared: Path, tmp_path: Path, updates: int) -> None:
    wanted = recipe(f"{STAGE} = {{ steps = 5, updates_per_step = {updates}, checkpoint_every = 4 }}")
    asking = asked_at(FakeTrainer, "step", 2 * updates + 1)  # in the first update of step 3
    said, again = same(wanted, prepared, tmp_path, NAME, asking)
    assert said == f"preempted (SIGTERM) at step 3 of stage {NAME!r}"
    assert [batch.index for batch in again.trainer.batches] == list(range(3 * updates, 5 * updates))


def test_rows_that_were_sampled_ahead_are_asked_again(prepared: Path, tmp_path: Path) -> None:
    """With other weights, as after any kill: which rows are learned from is the same, and none is left out."""
    settings = "steps = 4, prompts_per_step = 4, refill_rounds = 0, max_staleness = 1, checkpoint_every = 3"
    wanted = recipe(f"{STAGE} = {{ updates_per_step = 2, algorithm = 'reinforce++', evaluate = 'none', {settings} }}")
    folders = tmp_path / "whole", tmp_path / "stopped"
    for folder in folders:
        shutil.copytree(prepared, folder)
    whole = run(wanted, folders[0], until=NAME).trainer
    trainers = list[FakeTrainer]()

    def arrange(preemption: Preemption, patch: pytest.MonkeyPatch) -> None:
        asked_at(FakeTrainer, "step", 3)(preemption, patch)
        asking = FakeTrainer.step

        async def noted(self: FakeTrainer, *arguments: Any, **named: Any) -> Any:
            trainers[:] = [self]
            return await asking(self, *arguments, **named)

        patch.setattr(FakeTrainer, "step", noted)

    assert "at step 2 of" in preempted(wanted, folders[1], NAME, arrange)
    batches = [*trainers[0].batches, *run(wanted, folders[1], until=NAME).trainer.batches]
    assert [batch.index for batch in batches] == [batch.index for batch in whole.batches] == list(range(8))

    def rows(found: list[Any]) -> list[str]:
        samples = [sample for batch in found for part in batch.micro_batches[0] for sample in part]
        return sorted(sample.key.split("@")[0] for sample in samples)

    assert rows(batches) == rows(whole.batches)
    made = [found["artifact"]["digest"] for folder in folders for found in results(folder)[-1:]]
    assert made[0] == made[1]


def test_a_stage_that_only_samples_goes_on_after_its_step(prepared: Path, tmp_path: Path) -> None:
    found = dict[str, dict[str, str]]()
    for name in ("whole", "stopped"):
        folder, record = tmp_path / name, tmp_path / f"{name}-record"
        shutil.copytree(prepared, folder)
        wanted = recipe(f"{STAGE} = {{ steps = 4, learn = false, evaluate = 'none', record = '{record}' }}")
        if name == "stopped":
            share = next(stage.prompts_per_step for stage in wanted.stages if stage.name == NAME)
            asking = asked_at(FakeEngine, "generate", share + 1)  # in step 2
            assert preempted(wanted, folder, NAME, asking) == f"preempted (SIGTERM) at step 2 of stage {NAME!r}"
            assert len(list(record.glob("step-*.json"))) == 2
        run(wanted, folder, until=NAME)
        found[name] = {path.name: path.read_text() for path in record.glob("*.json")}
    assert found["stopped"] == found["whole"]
    assert results(tmp_path / "stopped")[-1]["steps"] == results(tmp_path / "whole")[-1]["steps"]


@pytest.mark.parametrize("kind", ["preference", "reward_model"])
def test_learning_from_pairs_goes_on_after_its_step(prepared: Path, tmp_path: Path, kind: str) -> None:
    learns = "data = { pairs = 1.0 }, steps = 5, batch_size = 2, lr = 1e-4, checkpoint_every = 4, evaluate = 'none'"
    wanted = recipe(f"stages.paired = {{ kind = '{kind}', start = 'instruct', {learns} }}")
    kept = [stage for stage in wanted.stages if stage.name in ("language", "vision", "align", "instruct", "paired")]
    asking = asked_at(FakeTrainer, "step", 2)
    said, again = same(wanted.model_copy(update={"stages": kept}), prepared, tmp_path, "paired", asking)
    assert said == "preempted (SIGTERM) at step 2 of stage 'paired'"
    assert [batch.index for batch in again.trainer.batches] == [2, 3, 4]


@pytest.mark.parametrize("step", [11, 14])
def test_in_a_trial_of_a_learning_rate_that_trial_begins_again(prepared: Path, tmp_path: Path, step: int) -> None:
    """A state in the middle of one is none to go back to."""
    said, _ = same(SEARCHED, prepared, tmp_path, "language", asked_at(FakeTrainer, "step", step))
    assert said.startswith("preempted (SIGTERM) at step ")


def test_rows_that_are_made_are_made_anew(prepared: Path, tmp_path: Path) -> None:
    wanted = recipe("stages.difficulty.samples = 3")
    said, again = same(wanted, prepared, tmp_path, "difficulty", asked_at(FakeEngine, "generate", 1))
    assert said == "preempted (SIGTERM) in stage 'difficulty'"
    assert len(again.engine.asked) == wanted.stages[6].prompts


def test_a_model_that_is_made_is_only_measured_anew(prepared: Path, tmp_path: Path) -> None:
    wanted = recipe("stages.align.steps = 4")
    said, again = same(wanted, prepared, tmp_path, "align", asked_at(FakeEngine, "generate", 1))
    assert said == "preempted (SIGTERM) in stage 'align'"
    assert not again.trainer.begun
    assert again.engine.asked


def test_an_exam_is_sat_anew(prepared: Path, tmp_path: Path) -> None:
    exam = recipe("stages.exam = { kind = 'evaluate', evaluate = 'modes', start = 'align' }")
    wanted = exam.model_copy(update={"stages": [*exam.stages[:3], exam.stages[-1]]})
    said, again = same(wanted, prepared, tmp_path, "exam", asked_at(FakeEngine, "generate", 1))
    assert said == "preempted (SIGTERM) in stage 'exam'"
    assert not again.trainer.begun


def test_after_its_last_step_a_stage_leaves_its_artifact(prepared: Path, tmp_path: Path) -> None:
    wanted = recipe("stages.language = { steps = 3, checkpoint_every = 2 }")
    said, again = same(wanted, prepared, tmp_path, "language", asked_at(FakeTrainer, "step", 3))
    assert said == "preempted (SIGTERM) after the last step of stage 'language'"
    assert not again.trainer.batches


def test_a_stage_that_has_no_step_yet_is_not_waited_for(prepared: Path, tmp_path: Path) -> None:
    wanted = recipe("stages.language = { steps = 3, checkpoint_every = 2 }")
    said, again = same(wanted, prepared, tmp_path, "language", asked_at(FakeTrainer, "begin", 1))
    assert said == "preempted (SIGTERM) in stage 'language'"
    assert len(again.trainer.batches) == 3


def test_a_step_that_takes_too_long_is_given_up(prepared: Path, tmp_path: Path) -> None:
    """Nothing but what was done since the last checkpoint is lost."""
    wanted = recipe("stages.language = { steps = 6, checkpoint_every = 2 }")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        shutil.copytree(prepared, folder)
    run(wanted, whole, until="language")
    preemption, step, calls = Preemption(grace=0.2), FakeTrainer.step, [0]

    async def hangs(trainer: FakeTrainer, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            preemption.ask("SIGTERM")
            await asyncio.Event().wait()
        return await step(trainer, *arguments, **named)

    with preemption, pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTrainer, "step", hangs)
        with pytest.raises(asyncio.CancelledError):
            run(wanted, stopped, until="language", preemption=preemption)
    assert preemption.cancelled == (
        "preempted (SIGTERM) in stage 'language': its step did not end within 0 s, so what it did since its last save "
        "is lost"
    )
    assert summary(stopped)["status"] == "preempted"
    again = run(wanted, stopped, until="language")
    assert [batch.index for batch in again.trainer.batches] == [2, 3, 4, 5]
    assert results(stopped) == results(whole)


def test_a_process_lost_after_the_notice_is_not_replaced(prepared: Path, tmp_path: Path) -> None:
    wanted = recipe("stages.language = { steps = 4, checkpoint_every = 2 }")

    def gone() -> None:
        raise ActorLostError("a trainer rank died during 'step'")

    said, again = same(wanted, prepared, tmp_path, "language", asked_at(FakeTrainer, "step", 4, also=gone))
    assert "a process of it was lost (a trainer rank died during 'step'), so what it did since its last save" in said
    assert [batch.index for batch in again.trainer.batches] == [2, 3]
    assert again.renewals == 0


def test_the_report_has_words_for_it(prepared: Path, tmp_path: Path) -> None:
    from rlhf import report

    wanted = recipe("stages.language = { steps = 4, checkpoint_every = 3 }")
    shutil.copytree(prepared, tmp_path / "run")
    preempted(wanted, tmp_path / "run", "language", asked_at(FakeTrainer, "step", 2))
    page = report.write(tmp_path / "run").read_text()
    assert f"{ENDS['preempted']} at <em>language</em>: SIGTERM.</strong>" in page
