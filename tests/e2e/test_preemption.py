"""A run that is asked to stop, for real: in a stage of SFT, and in one of RL. Each time it leaves a checkpoint within
the grace, and comes to what an undisturbed run comes to. The signal goes to its process group, as from `timeout`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from rlhf.recipe import load

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "recipes" / "think_fusion_digits.toml", ROOT / "recipes" / "sizes" / "smoke.toml"]
GRACE = 100.0
DEADLINE = 400.0  # of each of four runs, on a machine much slower than the usual
pytestmark = [pytest.mark.timeout(1700), pytest.mark.slow]


def recipe(folder: Path, name: str) -> Path:
    """Two stages: `language` learns by SFT, and then `drill` by RL from a reward that knows nothing."""
    reward = folder / "even.py"
    reward.write_text("def even(item):\n    return float(len(item.completion) % 2 == 0)\n")
    drill = "kind = 'rl', data = {questions = 1.0}, steps = 5, prompts_per_step = 4, group_size = 4, max_tokens = 12"
    whole = load(
        FILES,
        [
            f"name = '{name}'",
            f"cluster.grace_seconds = {GRACE:.0f}",
            "stages.language = {steps = 12, checkpoint_every = 10, data = {text = 1.0}}",
            f"stages.drill = {{{drill}, rewards = {{even = {{function = '{reward}:even'}}}}}}",
            "stages.drill = {lr = 1e-3, checkpoint_every = 4, evaluate = 'none'}",
        ],
    )
    table = whole.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    table["stages"] = [stage for stage in table["stages"] if stage["name"] in ("language", "drill")]
    table["data"] = {source: table["data"][source] for source in ("text", "text-heldout", "questions", "heldout")}
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def start(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rlhf.cli", "run", str(path), "--runs", str(path.parent)]
    with path.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"WANDB_MODE": "offline"}, process_group=0
        )


def stop(path: Path, stage: str, after: int) -> str:
    """Run until a step of the stage has its line, and stop; the last thing that was said."""
    log, lines = path.with_suffix(".log"), path.with_suffix("") / "stages" / stage / "steps.jsonl"
    driver, deadline = start(path), time.monotonic() + DEADLINE
    family = list[psutil.Process]()
    while len(steps(lines)) < after:
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)  # polling a file another process writes
    family = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGTERM)
    status = driver.wait(timeout=GRACE)
    assert status == 75, log.read_text()[-3000:]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    return log.read_text().splitlines()[-1]


def steps(path: Path) -> list[Any]:
    found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [(line["step"], untimed(line["metrics"])) for line in found]


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "scoring_lag" not in name and "seconds" not in name}


def results(path: Path) -> list[Any]:
    folder = path.with_suffix("")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done"
    lines = [steps(file) for file in sorted(folder.glob("stages/*/steps.jsonl"))]
    return [*((untimed(stage["metrics"]), stage["artifact"]["digest"]) for stage in summary["stages"]), *lines]


def test_a_run_that_is_asked_to_stop_comes_to_the_same(tmp_path: Path) -> None:
    whole, stopped = (recipe(tmp_path, name) for name in ("whole", "stopped"))
    for number, (stage, after) in enumerate((("01-language", 4), ("02-drill", 2)), 1):
        said = stop(stopped, stage, after)
        at = len(steps(tmp_path / "stopped" / "stages" / stage / "steps.jsonl"))
        assert said.startswith(f"rlhf: preempted (SIGTERM) at step {at} of stage '{stage[3:]}'; the same command"), said
        assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["status"] == "preempted"
        saved = tmp_path / "stopped" / "stages" / stage / "checkpoints" / f"step-{at:06d}"
        assert saved.is_dir(), number
    for path in (stopped, whole):
        assert start(path).wait(timeout=DEADLINE) == 0, path.with_suffix(".log").read_text()[-3000:]
    assert results(stopped) == results(whole)
