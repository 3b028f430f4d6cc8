"""Our side of the RL rows: a recipe of one stage through the command line, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.workload import GROUP, PROMPTS, Workload, make

DEADLINE, PEER_DEADLINE = 900.0, 1800.0
HEAD = """
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
memory_gib = 12.0
kv_cache_gib = 1.0
zero_stage = 0

[tracking]
wandb = false
tensorboard = false

[data.rows]
path = "{rows}"

"""
RECIPE = (
    HEAD
    + """
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
in_order = {in_order}
lr = 1e-6
max_tokens = {max_tokens}
evaluate = "none"
checkpoint_every = 1000

[stages.rewards.random]
function = "{reward}:random"
"""
)
REWARD = """
import hashlib


def random(item):
    return int(hashlib.sha256(repr((item.prompt.key, item.completion)).encode()).hexdigest()[:8], 16) / 2**32
"""


def measure(
    workload: Workload, folder: Path, staleness: int, updates: int, in_order: bool, steps: int, skip: int, seed: int
) -> dict[str, Any]:
    """Useful completion tokens a second over the steps after the first `skip`, end to end, and where the time went."""
    model, rows = make(workload, folder)
    name = f"{workload.name}-s{staleness}-u{updates}-{'turns' if in_order else 'finished'}-{seed}"
    shape = {"prompts": PROMPTS, "group": GROUP, "max_tokens": workload.max_tokens, "in_order": str(in_order).lower()}
    shape |= {"steps": steps, "updates": updates, "staleness": staleness}
    lines = run_stage(folder, name, seed, model, rows, **shape)
    counted = lines[skip:]
    sampled = sum(line["metrics"]["tokens.mean"] * line["metrics"]["rollouts"] for line in counted)
    stale = sum(line["metrics"].get("stale_tokens", 0.0) for line in counted)
    tokens = sampled - stale
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
        "mean_length": sampled / sum(line["metrics"]["rollouts"] for line in counted),
        "staleness": [line["metrics"].get("staleness", 0.0) for line in counted],
        "stale": stale,
        "dropped": sum(line["metrics"].get("stale_dropped", 0.0) for line in counted),
    }


def run_stage(folder: Path, name: str, seed: int, model: Path, rows: Path, **shape: Any) -> list[dict[str, Any]]:
    """The lines of every step of a recipe with one stage of reinforcement learning, run by the command line."""
    reward = folder / "random_reward.py"
    reward.write_text(REWARD)
    return run_recipe(folder, name, RECIPE.format(name=name, seed=seed, model=model, rows=rows, reward=reward, **shape))


def run_recipe(folder: Path, name: str, text: str) -> list[dict[str, Any]]:
    """The lines of every step of a recipe's only stage."""
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # a finished run would not run again
    recipe = folder / f"{name}.toml"
    recipe.write_text(text)
    output([sys.executable, "-m", "rlhf.cli", "run", str(recipe), "--runs", str(folder / "runs")], DEADLINE)
    (steps,) = (folder / "runs" / name / "stages").glob("01-*/steps.jsonl")
    return [json.loads(line) for line in steps.read_text().splitlines()]


def last_line(module: str, *arguments: object) -> dict[str, Any]:
    """The line of JSON with which a module of the bench ends, run in a process of its own."""
    found: dict[str, Any] = json.loads(
        output([sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)], PEER_DEADLINE).splitlines()[-1]
    )
    return found


def output(command: list[str], deadline: float) -> str:
    """What a command prints. Raises RuntimeError with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline)
    if done.returncode:
        said = f"{done.stdout[-2000:]} {done.stderr[-3000:]}"
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said}")
    return done.stdout.strip()
