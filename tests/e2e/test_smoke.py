"""The whole curriculum for real, a few steps a stage: Ray, vLLM, DeepSpeed, every kind of stage. The driver is killed
in the middle of stage B; the same command continues, loses its rollout worker there and its trainer in the stage of
the judge to more kills, and finishes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [
    *(sys.executable, "-m", "rlhf.cli", "run"),
    *(str(ROOT / "recipes" / "think_fusion_digits.toml"), str(ROOT / "recipes" / "sizes" / "smoke.toml")),
]
STAGE_B, JUDGE = "08-rl-verifiable", "11-judge"
DEADLINE = 900.0  # of each of two runs, on a machine much slower than the usual
pytestmark = pytest.mark.timeout(2400)


@dataclass(frozen=True)
class Run:
    """What was seen of the two runs: `before` are the steps of stage B as logged when the driver was killed, and
    `judge_before` those of the judge's when the trainer was; `finished_before` the results that existed then."""

    folder: Path
    before: list[dict[str, Any]]
    judge_before: list[dict[str, Any]]
    finished_before: dict[str, bytes]
    orphans: list[str]
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))

    def steps(self, folder: str) -> list[dict[str, Any]]:
        return _lines(self.folder / "stages" / folder / "steps.jsonl")

    def stage(self, name: str) -> dict[str, Any]:
        return next(stage for stage in self.summary["stages"] if stage["name"] == name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    runs = tmp_path_factory.mktemp("runs")
    folder = runs / "smoke"
    steps, judge = (folder / "stages" / name / "steps.jsonl" for name in (STAGE_B, JUDGE))
    first = _start(runs, log := runs / "first.log")
    _wait_for(lambda: len(_lines(steps)) >= 3, first, log)
    family = [first_process := psutil.Process(first.pid), *first_process.children(recursive=True)]
    before = _lines(steps)
    results = {str(path): path.read_bytes() for path in folder.glob("stages/*/result.json")}
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=30)
    second = _start(runs, log := runs / "second.log")
    _wait_for(lambda: len(_lines(steps)) >= 4, second, log)
    _kill(second, "VllmActor")
    _wait_for(lambda: len(_lines(judge)) >= 5, second, log)
    judge_before = _lines(judge)
    _kill(second, "TrainerActor")
    status = second.wait(timeout=DEADLINE)
    output = log.read_text()
    assert status == 0, output[-3000:]
    _, alive = psutil.wait_procs(family, timeout=150)
    orphans = [process.name() for process in alive]
    orphans += [p.name() for p in psutil.process_iter() if _mentions(p, str(runs))]
    return Run(folder, before, judge_before, results, orphans, output)


def test_it_finishes_every_stage(run: Run) -> None:
    assert [stage["status"] for stage in run.summary["stages"]] == ["done"] * 21
    kinds = {stage["kind"] for stage in run.summary["stages"]}
    assert kinds == {"sft", "preference", "reward_model", "rl", "synthesize", "evaluate"}
    assert 0 < run.summary["peak_rss_gib"] <= 8


def test_finished_stages_are_not_repeated_after_a_kill(run: Run) -> None:
    assert len(run.finished_before) == 7
    for path, content in run.finished_before.items():
        assert Path(path).read_bytes() == content


def test_the_killed_stage_is_restored_exactly(run: Run) -> None:
    after = run.steps(STAGE_B)
    assert [line["step"] for line in after] == [1, 2, 3, 4, 5]
    # how long scores took is no result
    replayed, seen = (
        {line["step"]: {k: v for k, v in line["metrics"].items() if not k.startswith("scoring_lag")} for line in lines}
        for lines in (after, run.before)
    )
    # the checkpoint is of step 2: step 3 was computed twice, from restored weights, optimizer, data and seeds
    assert 3 in seen
    assert replayed[3] == seen[3]


def test_preferences_move_an_adapter_away_from_its_base(run: Run) -> None:
    steps = run.steps("18-preferred")
    assert steps[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the adapter begins as its base
    assert all(line["metrics"]["margin"] != 0 for line in steps[1:])  # which way, three steps cannot tell
    assert (run.folder / "stages/18-preferred/artifact/adapter_config.json").exists()


def test_a_reward_model_says_what_a_policy_learns_from(run: Run) -> None:
    steps = run.steps("19-liking")
    assert steps[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # it begins with 0 for every reply
    metrics = run.stage("rl-liked")["metrics"]
    assert 0 < metrics["rl.reward.liked"] < 1
    assert metrics["rl.reward_failures"] == 0


def test_trainer_and_engine_agree(run: Run) -> None:
    for name in ("rl-verifiable", "rl-mixed"):
        metrics = run.stage(name)["metrics"]
        assert metrics["sync_probe.max"] <= 1e-4
        assert metrics["sync_probe.unreached_experts"] == 0
        assert metrics["logprob_gap.p999"] <= 2e-5
        assert metrics["rl.clip_fraction"] > 0


def test_lora_leaves_the_base_alone(run: Run) -> None:
    adapter = run.folder / run.stage("adapter")["artifact"]["path"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    base = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    from rlhf.checkpoint import digest

    assert digest(base) == run.stage("rl-mixed")["artifact"]["digest"]


def test_artifacts_open_in_transformers(run: Run) -> None:
    from transformers import AutoModelForImageTextToText

    from rlhf import bridge
    from rlhf.models import load_processor

    folder = run.folder / run.stage("rl-mixed")["artifact"]["path"]
    assert load_processor(folder).tokenizer.eos_token_id is not None
    bridge.register()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "BridgeMoeForConditionalGeneration"


def test_somebody_can_watch(run: Run) -> None:
    page = (run.folder / "report.html").read_text()
    assert "rl-mixed" in page
    assert "data:image/png;base64" in page
    assert list((run.folder / "tensorboard").rglob("events*"))
    assert "report:" in run.output


def test_no_process_is_left(run: Run) -> None:
    assert not run.orphans


def test_a_killed_rollout_worker_is_replaced(run: Run) -> None:
    # one before the driver was killed; then the policy's, its replacement, the judge's
    assert run.summary["engine_cold_starts"] == 4


def test_a_stage_that_loses_its_trainer_is_computed_again_to_the_same_numbers(run: Run) -> None:
    after = run.steps(JUDGE)
    assert [line["step"] for line in after] == list(range(1, 31))
    assert 5 <= len(run.judge_before) < 30
    assert run.output.count("[11/21 judge] sft starts") == 2
    assert [line["metrics"] for line in after[: len(run.judge_before)]] == [x["metrics"] for x in run.judge_before]


def _kill(driver: subprocess.Popen[bytes], actor: str) -> None:
    family = psutil.Process(driver.pid).children(recursive=True)
    worker = next(process for process in family if actor in " ".join(process.cmdline()))
    worker.send_signal(signal.SIGKILL)


def _start(runs: Path, log: Path) -> subprocess.Popen[bytes]:
    # a file, not a pipe: what a killed driver leaves behind for a while would hold a pipe open
    with log.open("w") as output:
        return subprocess.Popen(
            [*COMMAND, "--runs", str(runs)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"WANDB_MODE": "offline"},
        )


def _wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, "the run did not come so far in time"
        time.sleep(0.05)  # polling a file another process writes


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _mentions(process: psutil.Process, text: str) -> bool:
    try:
        return text in " ".join(process.cmdline()) and process.pid != os.getpid()
    except psutil.Error:
        return False
