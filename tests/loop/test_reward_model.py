"""Pairs, a reward model that learns from them, and a policy that learns from what it says, on fakes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.curriculum import train_spec
from rlhf.recipe import Recipe, RewardModel
from rlhf.stage import GateError
from rlhf.types import Scalar
from tests.loop.cast import FakeCast, FakeTrainer
from tests.loop.test_curriculum import recipe, run, summary

PAIRS = "evaluate = 'pairs', eval_data = 'pairs-heldout'"
STAGES = (
    "data.pairs-heldout = {builder = 'digits', table = 'pairs', split = 'heldout', rows = 16}",
    "stages.ranked = {kind = 'reward_model', data = {pairs = 1.0}, steps = 3, batch_size = 4, lr = 1e-3}",
    "stages.ranked.center = 0.01",
    f"stages.ranked = {{{PAIRS}, gates = [{{metric = 'reward_model.accuracy', min = 0.9}}]}}",
    f"stages.again = {{kind = 'evaluate', start = 'ranked', {PAIRS}}}",
    "stages.rl-ranked = {kind = 'rl', data = {questions = 1.0}, steps = 2, prompts_per_step = 4, group_size = 4}",
    "stages.rl-ranked = {max_tokens = 24, rewards = {liked = {scalar = 'ranked'}}}",
)


def ranked(*overrides: str) -> Recipe:
    """The digits up to long-cot, and these stages."""
    whole = recipe(*STAGES, *overrides)
    kept = ("language", "long-cot", "ranked", "again", "rl-ranked")
    return whole.model_copy(update={"stages": [stage for stage in whole.stages if stage.name in kept]})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeCast]:
    folder = tmp_path_factory.mktemp("ranked") / "run"
    return folder, run(ranked(), folder)


def test_a_policy_learns_from_a_reward_model_that_is_nobodys_default(finished: tuple[Path, FakeCast]) -> None:
    folder, cast = finished
    stages = {stage["name"]: stage for stage in summary(folder)["stages"]}
    assert all(stage["status"] == "done" for stage in stages.values())
    for name in ("ranked", "again"):
        found = stages[name]["metrics"]
        assert (found["reward_model.accuracy"], found["reward_model.margin"]) == (1.0, 2.0)
        assert found["reward_model.rows"] == 16
        assert found.keys() >= {"reward_model.calibration", "reward_model.accuracy.wrong_digit"}
    parents = {name: stage["artifact"]["parent"] for name, stage in stages.items()}
    digests = {name: stage["artifact"]["digest"] for name, stage in stages.items()}
    assert parents["ranked"] == parents["rl-ranked"] == digests["long-cot"]
    assert parents["again"] == digests["ranked"]
    # the trainer has the reward model that it trained, and measures it twice
    begun = [(Path(spec.model).parent.name, spec.scalar) for spec in cast.trainer.begun]
    assert begun == [("run", None), ("01-language", None), ("02-long-cot", Scalar()), ("02-long-cot", None)]
    scalar = cast.trainer.begun[2]
    assert dict(scalar.train) == {"*": 1e-3}
    assert not scalar.reference
    assert cast.rewards.asked
    assert set(cast.rewards.asked) == {("ranked", folder / "stages" / "03-ranked" / "artifact")}
    assert cast.rewards.scoring == {}
    assert stages["rl-ranked"]["metrics"]["rl.reward"] < -1  # short replies, as that model likes them, but some tokens


def test_another_reward_model_is_another_policy(finished: tuple[Path, FakeCast], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    again = run(ranked("stages.ranked.lr = 2e-3"), folder)
    assert [spec.scalar for spec in again.trainer.begun] == [Scalar(), None]


def test_what_is_measured_again_is_asked_as_it_was_made(tmp_path: Path) -> None:
    likely = "stages.ranked = {pool = 'likelihood', beta = 0.3}"
    run(ranked(likely), tmp_path / "run")
    again = run(ranked(likely, "evaluation.prompts = 8"), tmp_path / "run")
    asked = [spec.scalar for spec in again.trainer.begun if spec.scalar is not None]
    assert asked
    assert set(asked) == {Scalar("likelihood", 0.3)}


@pytest.mark.parametrize(
    ("changes", "train"),
    [
        ({"train": {"connector.*": 1e-4, "language_model.*": 2e-4}}, {"lm_head.*": 2e-4}),
        ({"train": {"language_model.*": 2e-4, "lm_head.*": 1e-3}}, {"lm_head.*": 1e-3}),
        ({"train": {"l*": 2e-4}}, {}),
        ({"lora": {}}, {}),
    ],
)
def test_the_head_always_learns(
    finished: tuple[Path, FakeCast], changes: dict[str, Any], train: dict[str, float]
) -> None:
    wanted = ranked()
    stage = RewardModel.model_validate(wanted.stages[2].model_dump(exclude={"lr", "train", "clip_grad"}) | changes)
    spec = train_spec(wanted, stage, finished[0] / "model", ())
    assert dict(spec.train) == dict(stage.train or {"*": stage.lr}) | train
    assert spec.whole == (("lm_head.*",) if "lora" in changes else ())


def test_a_reward_model_that_tells_nothing_misses_its_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def same(trainer: FakeTrainer, batch: object) -> dict[str, float]:
        return {s.key: 0.0 for part in batch.micro_batches[0] for s in part}  # type: ignore[attr-defined]

    monkeypatch.setattr(FakeTrainer, "rewards", same)
    with pytest.raises(GateError, match=r"'ranked' missed its gate: reward_model.accuracy is 0, wanted at least 0.9"):
        run(ranked(), tmp_path / "run")


def test_a_lost_trainer_is_replaced_and_pairs_go_on_where_they_were(tmp_path: Path) -> None:
    wanted = ranked("stages.ranked.steps = 5", "stages.ranked.checkpoint_every = 2")
    before = sum(stage.steps for stage in wanted.stages[:2])  # type: ignore[union-attr]
    whole = run(wanted, tmp_path / "whole", until="ranked")
    cast = run(wanted, tmp_path / "lost", until="ranked", lost_at=before + 3)
    assert cast.renewals == 1
    learned, expected = cast.trainer.batches[before:], whole.trainer.batches[before:]
    assert learned == [*expected[:3], *expected[2:5]]
