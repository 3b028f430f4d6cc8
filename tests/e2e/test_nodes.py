"""Where a plan says that processes stand is where Ray puts them: placement groups on simulated nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = '''
import json, sys, time
from pathlib import Path
from rlhf.cli import _private_ray
_private_ray(Path(sys.argv[1]))
import ray
from ray.cluster_utils import Cluster as Simulated
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from actors.launch import cluster_of
from rlhf.plan import Cluster, Node, gathered, make_plan, reserved
from rlhf.plan.nodes import packed
from rlhf.recipe import load

SHAPES = [(8, 4), (9, 8), (7, 8)]
MODELS = "recipes/models/sail_vl2_8b.toml"
plans = {
    "8b": ["resources.trainer_ranks = 4"],
    "8b wide": ["resources.tensor_parallel = 4", "resources.rollout_workers = 2", "resources.trainer_ranks = 8"],
    "8b of two": ["resources.tensor_parallel = 2", "resources.trainer_ranks = 8", "resources.reward_workers = 6"],
    "8b shared": ["resources.trainer_ranks = 16", "resources.trainer_threads = 1", "resources.rollout_workers = 6",
                  "resources.memory_gib = 2000"],
}

def stand(bundles, places, where):
    """By node, how many processes of each role."""
    found = {}
    for role, seats in gathered(bundles, places, where).items():
        for bundle in seats:
            roles = found.setdefault(f"{where[bundle]}", {})
            roles[role] = roles.get(role, 0) + 1
    return found

def freed(seconds=60):
    """Return when Ray counts all nodes as free: each reports a removed group's bundles as freed on its own, and a
    group asked for in between is packed around what is no longer there."""
    deadline, whole = time.monotonic() + seconds, ray.cluster_resources()
    while any(ray.available_resources().get(kind) != whole[kind] for kind in ("CPU", "GPU")):
        assert time.monotonic() < deadline, ray.available_resources()

simulated = Simulated(
    initialize_head=True,
    head_node_args={"num_cpus": SHAPES[0][0], "num_gpus": SHAPES[0][1], "include_dashboard": False},
)
try:
    for cpus, gpus in SHAPES[1:]:
        simulated.add_node(num_cpus=cpus, num_gpus=gpus)
    simulated.wait_for_nodes()
    seen = cluster_of(simulated.address)
    assert sorted((node.cpus, node.gpus) for node in seen.nodes) == sorted(SHAPES), seen
    nodes = tuple(Node(cpus, 900, gpus, 179 if gpus else None) for cpus, gpus in SHAPES)
    ray.init(address=simulated.address, log_to_driver=False, configure_logging=False)
    of = {node["NodeID"]: SHAPES.index((int(node["Resources"]["CPU"]), int(node["Resources"].get("GPU", 0))))
          for node in ray.nodes()}
    found = {}
    for name, overrides in plans.items():
        made = make_plan(load(["recipes/think_fusion_digits.toml", MODELS], overrides), Cluster(nodes))
        bundles, places = reserved(made.actors, made.shared_gpus)
        group = placement_group(bundles, strategy="PACK")
        ray.get(group.ready(), timeout=120)
        where = placement_group_table(group)["bundles_to_node_id"]
        by_ray, by_us = [of[where[index]] for index in range(len(bundles))], packed(bundles, nodes)
        found[name] = [stand(bundles, places, by_ray), stand(bundles, places, by_us)]
        assert {count for node in made.nodes for count in node.processes} == {
            (role, count) for roles in found[name][1].values() for role, count in roles.items()}
        remove_placement_group(group)
        freed()
    print(json.dumps(found), flush=True)
finally:
    ray.shutdown()
    simulated.shutdown()
'''


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_ray_packs_a_plans_bundles_as_the_plan_says(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"8b", "8b wide", "8b of two", "8b shared"}
    for name, (by_ray, by_us) in found.items():
        assert by_us == by_ray, name
    assert [len(by_ray) for by_ray, _ in found.values()] == [1, 3, 2, 3]
