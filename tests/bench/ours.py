"""Our side of the RL rows: a recipe of one stage through the command line, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.workload import GROUP, PROMPTS, Workload, make

DEADLINE = 900.0
RECIPE = """
name = "{name}"
seed = {seed}

[model]
path = "{model}"

[chat]
think_suffix = ""

[resources]
max_model_len = 320
token_budget = 8192
max_num_seqs = 512
kv_cache_gib = 1.0
zero_stage = 0

[tracking]
wandb = false
tensorboard = false

[data.rows]
path = "{rows}"

[[stages]]
name = "rl"
kind = "rl"
data = {{ rows = 1.0 }}
steps = {steps}
prompts_per_step = {prompts}
group_size = {group}
refill_rounds = 0
updates_per_step = {updates}
max_staleness = {staleness}
lr = 1e-6
max_tokens = {max_tokens}
evaluate = "none"
checkpoint_every = 1000

[stages.rewards.random]
function = "{reward}:random"
"""
REWARD = """
import hashlib


def random(item):
    return int(hashlib.sha256(repr((item.prompt.key, item.completion)).encode()).hexdigest()[:8], 16) / 2**32
"""


def measure(
    workload: Workload, folder: Path, staleness: int, updates: int, steps: int, skip: int, seed: int
) -> dict[str, Any]:
    """Useful completion tokens a second over the steps after the first `skip`, end to end, and where the time went."""
    model, rows = make(workload, folder)
    name = f"{workload.name}-s{staleness}-u{updates}-{seed}"
    reward = folder / "random_reward.py"
    reward.write_text(REWARD)
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # a finished run would not run again
    recipe = folder / f"{name}.toml"
    recipe.write_text(
        RECIPE.format(
            name=name,
            seed=seed,
            model=model,
            rows=rows,
            steps=steps,
            prompts=PROMPTS,
            group=GROUP,
            updates=updates,
            staleness=staleness,
            max_tokens=workload.max_tokens,
            reward=reward,
        )
    )
    command = [sys.executable, "-m", "rlhf.cli", "run", str(recipe), "--runs", str(folder / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        )
    lines = [
        json.loads(line) for line in (folder / "runs" / name / "stages/01-rl/steps.jsonl").read_text().splitlines()
    ]
    counted = lines[skip:]
    tokens = sum(line["metrics"]["tokens.mean"] * line["metrics"]["rollouts"] for line in counted)
    seconds = lines[-1]["time"] - lines[skip - 1]["time"]
    phases: dict[str, float] = {}
    for line in counted:
        for phase, value in line["seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + value
    named = sum(phases.values())
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "phases": phases,
        "overhead": 1 - named / seconds,
        "mean_length": tokens / sum(line["metrics"]["rollouts"] for line in counted),
        "staleness": [line["metrics"].get("staleness", 0.0) for line in counted],
        "dropped": sum(line["metrics"].get("stale_dropped", 0.0) for line in counted),
    }
