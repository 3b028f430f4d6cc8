"""An ordinary Hugging Face vision-language model (a tiny random Qwen3-VL) through `rlhf check` and RL steps. vLLM's own
implementation computes what the trainer computes, its Transformers backend loses the deepstack features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# torchvision lies apart (`make test` puts it there): beside it every process of the digits recipe would import it
TORCHVISION = Path(sys.prefix) / "torchvision"
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not TORCHVISION.is_dir(), reason="torchvision is missing: run the tests with `make test`"),
]

RECIPE = """
name = "ordinary"

[model]
path = "{model}"

[chat]
think_suffix = "think first."

[resources]
max_model_len = 160
token_budget = 1024
max_num_seqs = 16
zero_stage = 0

[data.questions]
builder = "digits"
table = "prompts"
rows = 32

[[stages]]
name = "rl"
kind = "rl"
data = {{ questions = 1.0 }}
steps = 2
prompts_per_step = 4
group_size = 4
updates_per_step = 2
lr = 1e-3
max_tokens = 16
evaluate = "none"

[stages.rewards.vowels]
function = "{reward}:vowels"
"""

REWARD = """
def vowels(item):
    return sum(letter in "aeiou" for letter in item.completion)
"""


def rlhf(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(TORCHVISION), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_an_ordinary_model_is_checked_then_trained(tmp_path: Path) -> None:
    model, reward, recipe = tmp_path / "model", tmp_path / "reward.py", tmp_path / "recipe.toml"
    made = rlhf(str(Path(__file__).with_name("tiny_qwen3vl.py")), str(model))
    assert made.returncode == 0, made.stderr[-2000:]
    reward.write_text(REWARD)
    recipe.write_text(RECIPE.format(model=model, reward=reward))

    checked = rlhf("-m", "rlhf.cli", "check", str(recipe), "--runs", str(tmp_path))
    assert checked.returncode == 0, checked.stdout[-2000:] + checked.stderr[-2000:]
    verdicts = {v["implementation"]: v for v in json.loads((tmp_path / "verdicts.json").read_text())}
    assert verdicts["vllm"]["proven"]
    assert verdicts["vllm"]["max_gap"] < 1e-5
    assert not verdicts["transformers"]["proven"]

    ran = rlhf("-m", "rlhf.cli", "run", str(recipe), "--runs", str(tmp_path))
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (stage,) = json.loads((tmp_path / "ordinary" / "summary.json").read_text())["stages"]
    metrics = stage["metrics"]
    assert metrics["logprob_gap.p999"] < 2e-5
    assert metrics["sync_probe.max"] < 1e-4
    assert (tmp_path / "ordinary" / stage["artifact"]["path"] / "model.safetensors").is_file()
