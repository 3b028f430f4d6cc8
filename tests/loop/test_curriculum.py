"""The whole curriculum on a fake cast: order, gates, lineage, resume. No process is started, nothing learns."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpoint import CheckpointError
from rlhf.curriculum import Curriculum
from rlhf.data.rows import DataError, read
from rlhf.footprint import Footprint
from rlhf.models import load_processor
from rlhf.plan import PlanError, check
from rlhf.preemption import Preemption
from rlhf.recipe import Recipe, RecipeError, Sft, load
from rlhf.stage import GateError
from rlhf.tracking import Tracker
from rlhf.types import Batch
from tests.loop.cast import FakeCast, FakeTrainer, KilledError

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = [RECIPES / "think_fusion_digits.toml", RECIPES / "sizes" / "smoke.toml"]
QUIET = ["tracking.wandb = false", "tracking.tensorboard = false"]
# fakes start no engine: stages that the smoke run spares it are measured here
MEASURED = [f"stages.{name}.evaluate = 'modes'" for name in ("align", "instruct", "upcycle")]


def recipe(*overrides: str) -> Recipe:
    return load(FILES, [*QUIET, *MEASURED, *overrides])


def run(
    recipe: Recipe,
    folder: Path,
    die_at: int | None = None,
    lost_at: int | None = None,
    until: str | None = None,
    best: float = 1.0,
    breaks_at: float | None = None,
    preemption: Preemption | None = None,
) -> FakeCast:
    """Run a recipe in folder on a fake cast, as the command line would, and return the cast. Its trainer raises
    KilledError at step `die_at` of the whole run, ActorLostError, once, at step `lost_at`, and FloatingPointError at
    `breaks_at` times the recipe's rates and higher ones; at `best` times those it is fastest. `until`: the last stage
    to run; `preemption`: what may ask the run to stop."""
    if until is not None:
        last = [stage.name for stage in recipe.stages].index(until)
        recipe = recipe.model_copy(update={"stages": recipe.stages[: last + 1]})

    async def go() -> FakeCast:
        with Tracker(folder, recipe.name, recipe.tracking) as tracker:
            notice = preemption or Preemption()
            notice.task = asyncio.current_task()
            curriculum = Curriculum(recipe, folder, tracker, Footprint(), preemption=notice)
            curriculum.prepare()
            cast = FakeCast(load_processor(curriculum.model_before(curriculum.recipe.stages[0])).tokenizer)
            cast.trainer.die_at, cast.trainer.lost_at = die_at, lost_at
            cast.trainer.best, cast.trainer.breaks_at = best, breaks_at
            await curriculum.run(cast)
            return cast

    return asyncio.run(go())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeCast]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(recipe(), folder)


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def test_every_stage_leaves_an_artifact_with_lineage(finished: tuple[Path, FakeCast]) -> None:
    folder, _ = finished
    stages = {stage["name"]: stage for stage in summary(folder)["stages"]}
    assert list(stages) == [stage.name for stage in recipe().stages]
    assert all(stage["status"] == "done" for stage in stages.values())
    assert stages["rl-verifiable"]["artifact"]["parent"] == stages["long-cot"]["artifact"]["digest"]
    assert stages["judge"]["artifact"]["parent"] == stages["instruct"]["artifact"]["digest"]
    assert stages["think-fusion"]["artifact"]["parent"] == stages["rl-verifiable"]["artifact"]["digest"]
    paths = [stage["artifact"]["path"] for stage in stages.values() if stage["kind"] != "evaluate"]
    assert all((folder / path).is_dir() for path in paths)


def test_metrics_of_the_summary(finished: tuple[Path, FakeCast]) -> None:
    stages = {stage["name"]: stage["metrics"] for stage in summary(finished[0])["stages"]}
    drilled = stages["rl-verifiable"]
    for name in ("eval.think.accuracy", "eval.direct.think_rate", "eval.think.greedy", "eval.think.pass@2"):
        assert 0.0 <= drilled[name] <= 1.0
    assert drilled["eval.think.accuracy.low"] <= drilled["eval.think.accuracy"] <= drilled["eval.think.accuracy.high"]
    assert drilled["eval.direct.think_rate"] == drilled["eval.direct.think_rate.sum"] == 0.0
    assert drilled["eval.think.think_rate.sum"] == 1.0
    assert drilled["eval.think.tokens.sum"] > drilled["eval.direct.tokens.sum"]
    assert drilled["logprob_gap.share_above_1e-4"] == 0.0
    assert 0.9e-6 < drilled["logprob_gap.p999"] < 1.2e-6
    assert drilled["sync_probe.max"] == 1e-6
    assert drilled["rl.clip_fraction"] == pytest.approx(0.1)
    assert {"judge.precision", "judge.recall", "judge.kappa"} <= stages["judge"].keys()


def test_one_mode_alone_can_be_asked(tmp_path: Path) -> None:
    run(recipe("evaluation.modes = ['think']", "evaluation.by = 'kind'"), tmp_path, until="align")
    metrics = next(stage["metrics"] for stage in summary(tmp_path)["stages"] if stage["name"] == "align")
    assert metrics["eval.think.think_rate.reasoning"] == 1.0
    assert not [name for name in metrics if name.startswith("eval.direct.")]


def test_judge_and_policy_are_served_together_in_mixed_rl(finished: tuple[Path, FakeCast]) -> None:
    roles = [set(models) for models in finished[1].served]
    assert {"policy", "judge"} in roles
    assert sum(roles_ == {"policy", "judge"} for roles_ in roles) == 2  # rejection sampling and rl-mixed


def test_a_judge_learns_from_the_policys_own_chains(finished: tuple[Path, FakeCast]) -> None:
    stages = {stage["name"]: stage for stage in summary(finished[0])["stages"]}
    rows = read(finished[0] / stages["own-chains"]["artifact"]["path"] / "rows.parquet")
    assert len(rows) == stages["own-chains"]["metrics"]["synthesis.kept"] > 0
    for index in range(len(rows)):
        asked, reply = (message["content"] for message in rows[index]["messages"])
        assert asked[0]["type"] == "image"
        assert asked[-1]["text"].startswith("question: ")
        assert "i see it." in asked[-1]["text"]
        assert reply[0]["text"].startswith("see ")
        assert reply[0]["text"].endswith(" no")
        assert (rows[index]["sound"], rows[index]["answer"], rows[index]["think"]) == (False, "no", False)
    assert stages["judge-of-own"]["metrics"]["judge.rows"] > 0


def test_running_again_repeats_nothing(finished: tuple[Path, FakeCast]) -> None:
    folder, _ = finished
    before = summary(folder)
    again = run(recipe(), folder)
    assert not again.trainer.begun
    assert not again.engine.asked
    after = summary(folder)
    assert [stage["artifact"] for stage in after["stages"]] == [stage["artifact"] for stage in before["stages"]]


def test_a_changed_evaluation_measures_again_and_trains_nothing(
    finished: tuple[Path, FakeCast], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    again = run(recipe("evaluation.prompts = 4"), folder)
    # held-out losses, of language and vision, are measured by the trainer, which is given what they made
    assert [Path(spec.model).parent.name for spec in again.trainer.begun] == ["01-language", "02-vision"]
    assert again.trainer.steps == 0
    assert again.engine.asked
    before, after = summary(finished[0]), summary(folder)
    trained = [i for i, stage in enumerate(after["stages"]) if stage["kind"] in ("sft", "rl")]
    for i in trained:
        assert after["stages"][i]["artifact"]["digest"] == before["stages"][i]["artifact"]["digest"]


def test_what_is_not_measured_does_not_care_how_others_are(finished: tuple[Path, FakeCast], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("stages/*/result.json")}
    run(recipe("evaluation.prompts = 8"), folder)
    after = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("stages/*/result.json")}
    again = {name for name in before if after[name] != before[name]}
    assert not again & {"07-difficulty", "09-own-chains", "13-rejection", "15-hard-cases"}
    assert {"04-instruct", "08-rl-verifiable", "16-rl-mixed"} <= again


def test_an_interrupted_stage_has_taken_time_too(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run(recipe(), tmp_path, die_at=3)
    first = json.loads((tmp_path / "summary.json").read_text())["wall_seconds"]
    assert first > 0
    with pytest.raises(KilledError):
        run(recipe(), tmp_path, die_at=3)
    assert json.loads((tmp_path / "summary.json").read_text())["wall_seconds"] > first


def test_rows_that_no_judge_can_be_measured_on_are_refused_before_the_first_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows of 'heldout' have no 'sound' and 'corruption'"):
        run(recipe("stages.judge.eval_data = 'heldout'"), tmp_path)
    assert not (tmp_path / "stages").exists()


def test_another_way_of_judging_spares_what_no_judge_touched(finished: tuple[Path, FakeCast], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    again = run(recipe("judging.max_tokens = 23"), folder)
    begun = [Path(spec.model).parent.name for spec in again.trainer.begun]
    assert begun[-1] == "14-think-fusion"  # rl-mixed on top of it
    assert not {"04-instruct", "06-long-cot"} & set(begun)  # the judge, and B
    before, after = (
        {stage["name"]: stage["artifact"]["evaluation_digest"] for stage in summary(where)["stages"]}
        for where in (finished[0], folder)
    )
    assert before["rl-verifiable"] == after["rl-verifiable"]
    assert before["judge"] != after["judge"]
    assert before["judge-of-own"] != after["judge-of-own"]


def test_another_seed_starts_from_another_model(finished: tuple[Path, FakeCast], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    again = run(recipe("seed = 1"), folder)
    assert len(again.trainer.begun) == len(finished[1].trainer.begun)
    names = [path.name for path in (folder / "model").glob("*.safetensors")]
    assert names
    for name in names:
        assert (folder / "model" / name).read_bytes() != (finished[0] / "model" / name).read_bytes()


def test_a_changed_stage_runs_again_with_what_follows(finished: tuple[Path, FakeCast], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    again = run(recipe("stages.think-fusion.lr = 1e-5"), folder)
    begun = [Path(spec.model).parent.name for spec in again.trainer.begun]
    # think-fusion itself, then rl-mixed and the preferences on top of it
    assert begun == ["08-rl-verifiable", "14-think-fusion", "14-think-fusion"]


def test_killed_in_the_middle_of_rl_continues_from_the_checkpoint(tmp_path: Path) -> None:
    wanted = recipe(
        "stages.language.steps = 4",
        "stages.long-cot.steps = 4",
        "stages.rl-verifiable.steps = 5",
        "stages.rl-verifiable.checkpoint_every = 2",
    )
    whole = run(wanted, tmp_path / "whole")
    folder = tmp_path / "killed"
    before_rl = sum(stage.steps for stage in wanted.stages[:6] if isinstance(stage, Sft))
    with pytest.raises(KilledError):
        run(wanted, folder, die_at=before_rl + 5)  # between the two updates of step 3
    again = run(wanted, folder)
    assert Path(again.trainer.begun[0].model).parent.name == "06-long-cot"
    # steps 3, 4, 5 of two updates each: the checkpoint was of step 2
    assert again.trainer.batches[:6] == whole.trainer.batches[before_rl + 4 : before_rl + 10]
    digests = [[stage["artifact"]["digest"] for stage in summary(f)["stages"]] for f in (folder, tmp_path / "whole")]
    assert digests[0] == digests[1]


def test_a_lost_trainer_is_replaced_and_the_stage_goes_on(tmp_path: Path) -> None:
    wanted = recipe("stages.language.steps = 5", "stages.language.checkpoint_every = 2")
    whole = run(wanted, tmp_path / "whole")
    folder = tmp_path / "lost"
    cast = run(wanted, folder, lost_at=3)
    assert cast.renewals == 1
    # steps 1, 2, 3 (lost before its checkpoint), then from the checkpoint of step 2: 3, 4, 5
    assert cast.trainer.batches[:6] == [*whole.trainer.batches[:3], *whole.trainer.batches[2:5]]
    digests = [[stage["artifact"]["digest"] for stage in summary(f)["stages"]] for f in (folder, tmp_path / "whole")]
    assert digests[0] == digests[1]


SEARCHED = recipe(
    "stages.language = { steps = 40, checkpoint_every = 3, search = { window = 4, decay = 1.0, span = [0.1, 0.9] } }"
)


@pytest.mark.parametrize("best", [3.0, 0.4])
def test_a_search_finds_the_learning_rate_and_takes_back_what_was_slower(tmp_path: Path, best: float) -> None:
    cast = run(SEARCHED, tmp_path, until="language", best=best)
    steps = [
        json.loads(line) for line in (tmp_path / "stages" / "01-language" / "steps.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert cast.trainer.steps == 40  # of them; those that were taken back are more
    batches = cast.trainer.batches
    assert len(batches) == 40 + 4 * taken_back(batches)
    assert taken_back(batches) >= 2
    assert max(best / batches[-1].scale, batches[-1].scale / best) < 3  # by whole factors it comes no closer
    losses = [line["metrics"]["loss"] for line in steps]
    assert losses == sorted(losses, reverse=True)  # none is of a step that was taken back
    assert cast.trainer.progress > 1.3 * 40 * min(best, 1 / best)  # of 40 steps at the recipe's own rate


def taken_back(batches: list[Batch]) -> int:
    """How often the step after a batch was one that had been."""
    return sum(later.index <= earlier.index for earlier, later in pairwise(batches))


@pytest.mark.parametrize("die_at", [11, 14, 17, 30])
def test_killed_in_a_trial_a_search_begins_that_trial_again(tmp_path: Path, die_at: int) -> None:
    whole = run(SEARCHED, tmp_path / "whole", until="language", best=3.0)
    with pytest.raises(KilledError):
        run(SEARCHED, tmp_path / "killed", until="language", best=3.0, die_at=die_at)
    again = run(SEARCHED, tmp_path / "killed", until="language", best=3.0)
    assert again.trainer.progress == pytest.approx(whole.trainer.progress, abs=1e-9)
    assert again.trainer.batches[-1] == whole.trainer.batches[-1]


def test_a_rate_that_breaks_the_loss_is_taken_back_when_tried_and_an_error_otherwise(tmp_path: Path) -> None:
    cast = run(SEARCHED, tmp_path, until="language", breaks_at=2.5)
    assert cast.trainer.steps == 40
    assert cast.trainer.batches[-1].scale < 2.5
    with pytest.raises(FloatingPointError):
        run(SEARCHED, tmp_path / "at-once", until="language", breaks_at=0.5)


def test_a_missed_gate_stops_the_job_and_keeps_the_artifact(tmp_path: Path) -> None:
    strict = recipe('stages.align.gates = [{metric = "eval.extra.accuracy", min = 1.1}]')
    with pytest.raises(GateError, match=r"'align' missed its gate: eval.extra.accuracy is .*at least 1.1"):
        run(strict, tmp_path)
    stages = summary(tmp_path)["stages"]
    assert [stage["name"] for stage in stages] == ["language", "vision", "align"]
    assert stages[-1]["status"] == "gate failed"
    lenient = recipe('stages.align.gates = [{metric = "eval.extra.accuracy", min = 0.0}]')
    again = run(lenient, tmp_path)
    assert Path(again.trainer.begun[0].model).parent.name == "03-align"  # a gate is no input: align is not repeated


def test_a_full_disk_leaves_no_partial_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_space(self: object, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tests.loop.cast.FakeTrainer.export", no_space)
    with pytest.raises(CheckpointError, match=r"artifact: could not be written .*No space left"):
        run(recipe(), tmp_path)
    assert not list(tmp_path.glob("stages/*/artifact"))
    assert not list(tmp_path.glob("stages/*/.partial*"))


def test_an_edited_reward_is_another_reward(finished: tuple[Path, FakeCast], tmp_path: Path) -> None:
    reward = tmp_path / "mine.py"
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    wanted = recipe(f'stages.rl-mixed.rewards.answer.function = "{reward}:long"')
    begun = []
    for code in ("return len(item.completion) % 7", "return len(item.completion) % 5"):
        reward.write_text(f"def long(item):\n    {code}\n")
        begun.append([Path(spec.model).parent.name for spec in run(wanted, folder).trainer.begun])
    assert begun[0][0] == begun[1][0] == "14-think-fusion"  # rl-mixed, and what follows where its artifact changed
    assert not run(wanted, folder).trainer.begun


def test_rewards_that_fail_stop_the_run_with_the_reason(tmp_path: Path) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def broken(item):\n    raise KeyError('unit')\n")
    spoiled = recipe(f'stages.rl-verifiable.rewards.answer.function = "{reward}:broken"')
    with pytest.raises(RuntimeError, match=r"(?s)rewards failed on 100.0% .*KeyError: 'unit'"):
        run(spoiled, tmp_path / "run")


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_an_artifact_that_is_not_as_it_was_left_is_made_again(
    finished: tuple[Path, FakeCast], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    artifact = folder / "stages" / "05-upcycle" / "artifact"
    if damage == "lost":
        shutil.rmtree(artifact)
    else:
        os.truncate(artifact / "model.safetensors", 1000)
    again = run(recipe(), folder)
    assert "05-upcycle/artifact is not as its stage left it" in capsys.readouterr().out
    assert len(again.trainer.begun) == 1  # what follows has the same parent as before
    assert summary(folder)["stages"] == [
        stage | {"seconds": found["seconds"], "metrics": found["metrics"]}
        for stage, found in zip(summary(finished[0])["stages"], summary(folder)["stages"], strict=True)
    ]


def test_a_damaged_record_is_named(finished: tuple[Path, FakeCast], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    os.truncate(folder / "stages" / "05-upcycle" / "result.json", 100)
    with pytest.raises(CheckpointError, match=r"05-upcycle/result.json is damaged \(.*\); delete it"):
        run(recipe(), folder)
    (folder / "stages" / "05-upcycle" / "result.json").unlink()
    assert not run(recipe(), folder).trainer.begun  # its artifact is whole; it is measured again


def test_the_summary_says_how_a_run_ended(tmp_path: Path) -> None:
    def ended() -> tuple[str, str]:
        return (found := summary(tmp_path))["status"], found["error"]

    with pytest.raises(KilledError):
        run(recipe(), tmp_path, die_at=3)
    assert ended() == ("failed", "KilledError: ")
    run(recipe(), tmp_path, until="align")
    assert ended() == ("done", "")
    with pytest.raises(GateError):
        run(recipe('stages.align.gates = [{metric = "eval.extra.accuracy", min = 1.1}]'), tmp_path, until="align")
    assert ended()[0] == "failed"
    assert "missed its gate" in ended()[1]


def soup(weight: float = 1.0) -> list[str]:
    """Two more runs of `instruct`, and their average."""
    stage = "{ kind = 'sft', start = 'align', data = { direct = 1.0 }, steps = 2, batch_size = 4, lr = 1e-3 }"
    return [
        f"stages.again = {stage}",
        f"stages.oncemore = {stage}",
        f"stages.soup = {{ kind = 'merge', of = {{ again = 1.0, oncemore = {weight} }}, on = 'text-heldout' }}",
    ]


def souped(weight: float = 1.0) -> Recipe:
    full = recipe(*soup(weight))
    kept = [stage for stage in full.stages if stage.name in ("align", "again", "oncemore", "soup")]
    return full.model_copy(update={"stages": kept})


def test_models_of_one_kind_are_averaged_and_others_refused(tmp_path: Path) -> None:
    cast = run(souped(), tmp_path)
    made = {stage["name"]: stage for stage in summary(tmp_path)["stages"]}
    assert made["soup"]["metrics"]["merge.barrier"] == pytest.approx(0)
    assert made["soup"]["metrics"]["merge.loss.again"] == 0.5
    assert (tmp_path / made["soup"]["artifact"]["path"] / "model.safetensors").is_file()
    measured = [Path(spec.model).name for spec in cast.trainer.begun[-3:]]
    assert measured == ["artifact", "artifact", "merged"]
    assert not run(souped(), tmp_path).trainer.begun  # it is done
    again = run(souped(2.0), tmp_path)
    assert len(again.trainer.begun) == 3  # other weights: merged and measured anew


def test_an_average_that_loses_more_than_its_members_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = FakeTrainer.begin

    async def worse(self: FakeTrainer, spec: Any, probes: Any) -> Any:
        self.merged_loss = 0.9
        return await begin(self, spec, probes)

    monkeypatch.setattr(FakeTrainer, "begin", worse)
    with pytest.raises(GateError, match=r"'soup': the average of again, oncemore loses 0.4 nats .* above max_barrier"):
        run(souped(), tmp_path)
    assert not list(tmp_path.glob("stages/*-soup/artifact"))
    tolerant = souped()
    merge = tolerant.stages[-1].model_copy(update={"max_barrier": 0.5})
    run(tolerant.model_copy(update={"stages": [*tolerant.stages[:-1], merge]}), tmp_path)
    assert list(tmp_path.glob("stages/*-soup/artifact"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("stages.soup.of.oncemore = { remove = true }", "fewer than two stages"),
        ("stages.soup.of.agian = 1.0", "of = 'agian' is no stage; did you mean 'again'"),
        ("stages.soup.of.upcycle = 1.0", "'upcycle' and 'again' leave models of other shapes"),
        ("stages.soup.on = 'heldot'", "on 'heldot' is no .data. source.* did you mean 'heldout'"),
        ("stages.soup.start = 'again'", "`start` does nothing beside `of`"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_the_plan(change: str, says: str) -> None:
    with pytest.raises((PlanError, RecipeError), match=says):
        check(recipe(*soup(), change))


def test_candidates_are_ranked_by_their_likelihood(tmp_path: Path) -> None:
    """The fake finds shorter answers likelier."""
    rows = tmp_path / "rows.jsonl"
    asked = [{"role": "user", "content": "how many?"}]
    written = [
        {"messages": asked, "candidates": ["1", "seventeen", "one hundred"], "answer": "1"},
        {"messages": asked, "candidates": ["seventeen", "2"], "answer": "2"},
        {"messages": asked, "candidates": ["1", "twenty one"], "answer": "twenty one"},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    source = f"data.closed.path = '{rows}'"
    measured = "stages.align = { evaluate = 'rank', eval_data = 'closed' }"
    run(recipe(source, measured), tmp_path / "run", until="align")
    metrics = summary(tmp_path / "run")["stages"][-1]["metrics"]
    assert metrics["eval.rank.accuracy"] == pytest.approx(2 / 3)
    assert metrics["eval.rank.chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert metrics["eval.rank.rows"] == 3
    rows.write_text(json.dumps(written[0] | {"answer": "3"}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl, row 0: the answer '3' is none of its candidates"):
        run(recipe(source, measured), tmp_path / "wrong", until="align")


def test_an_evaluate_stage_measures_a_loss_of_any_model(tmp_path: Path) -> None:
    """Before anything has trained, and after a stage that makes it."""
    before = "stages.before = { kind = 'evaluate', evaluate = 'loss', eval_data = 'text-heldout' }"
    made = load([*FILES], [*QUIET, *MEASURED, before])
    made = made.model_copy(update={"stages": [made.stages[-1], made.stages[0]]})
    cast = run(made, tmp_path)
    assert [Path(spec.model).name for spec in cast.trainer.begun] == ["model", "model"]
    found = {stage["name"]: stage["metrics"] for stage in summary(tmp_path)["stages"]}
    for metrics in found.values():
        assert metrics["eval.loss"] == pytest.approx(0.5)
        assert metrics["eval.exact"] == pytest.approx(0.5)
        assert "eval.exact.sum" in metrics
