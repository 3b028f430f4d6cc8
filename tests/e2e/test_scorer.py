"""A reward model in a real Ray actor: what it says there is what it says here, also after its process was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.scalar import one_output, write_head
from actors.scorer import Scorer, ScorerSettings
from rlhf.types import Scalar
from tests.unit.test_bridge_build import MOE, tiny
from tests.unit.test_reward_model import groups, values

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "scored"
model = {{path = "{folder}"}}
data.pairs = {{builder = "digits", table = "pairs"}}
[resources]
token_budget = 300
[[stages]]
name = "ranked"
kind = "reward_model"
data = {{pairs = 1}}
steps = 1
batch_size = 2
[[stages]]
name = "practice"
kind = "rl"
data = {{pairs = 1}}
steps = 1
prompts_per_step = 2
rewards.liked = {{scalar = "ranked"}}
"""
DRIVER = """
import asyncio, json, sys
from pathlib import Path
from rlhf.cli import _private_ray
folder = Path(sys.argv[1])
_private_ray(folder.parent)
import ray
from actors.handles import RewardsHandle, TrainerHandle
from actors.launch import Cast, Placement
from rlhf.models import load_processor
from rlhf.plan import Cluster, Node, make_plan
from rlhf.recipe import load
from tests.unit.test_reward_model import groups, values

async def work():
    recipe = load([folder.parent / "recipe.toml"])
    placement = await Placement.reserve(recipe, make_plan(recipe, Cluster((Node(2, 24),))))
    rewards = RewardsHandle(placement.reward, recipe.deadlines)
    cast = Cast(placement, TrainerHandle([], recipe.deadlines), rewards)
    asked = groups(load_processor(folder))
    async with cast.scoring({"ranked": folder}):
        scalar = rewards.scalars["ranked"]
        first = values(await rewards.scalar("ranked", asked))
        ray.kill(scalar.worker)
        again = values(await rewards.scalar("ranked", asked))
    return [first, again, scalar.restarts, list(rewards.scalars)]

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
try:
    print(json.dumps(asyncio.run(work())), flush=True)
finally:
    ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_reward_model_scores_in_a_process_of_its_own_and_survives_its_death(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    model, processor = tiny(decoder=MOE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    head = one_output(model, bias=False)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    write_head(folder, head.weight.detach(), Scalar())
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=folder))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # of the actors, too
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, again, restarts, left = json.loads(done.stdout.splitlines()[-1])
    here = Scorer(str(folder), ScorerSettings("float32", 300, packed=True, threads=1, device="cpu"))
    assert first == again == values(here.score(groups(processor)))
    assert (restarts, left) == (1, [])
