"""Plans for clusters that are not there: what fits where, who stands where, and what would fit where it does not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from rlhf.architecture import architecture_of
from rlhf.cli import main
from rlhf.plan import Cluster, Node, Plan, PlanError, describe, make_plan
from rlhf.plan.nodes import gathered, packed
from rlhf.recipe import RecipeError, load

ROOT = Path(__file__).parents[2]
MODELS, SITES = ROOT / "recipes" / "models", ROOT / "recipes" / "sites"
CURRICULUM = ROOT / "recipes" / "think_fusion_digits.toml"
# as published: Qwen3-1.7B, -8B and -30B-A3B; the whole as the SAIL-VL2 report rounds it
PUBLISHED = {
    "sail_vl2_2b": (1_720_574_976, 1_720_574_976, None),
    "sail_vl2_8b": (8_190_735_360, 8_190_735_360, 8.8e9),
    "sail_vl2_30b_a3b": (30_532_122_624, 3.35e9, 31.1e9),
}
H100 = Node(96, 1800, 8, 79)
SMALL = Node(48, 400, 8, 23.5)


def plan(model: str, cluster: Cluster, *overrides: str) -> Plan:
    return make_plan(load([CURRICULUM, MODELS / f"{model}.toml"], overrides), cluster)


@pytest.mark.parametrize("model", PUBLISHED)
def test_sizes_are_the_published_ones(model: str) -> None:
    decoder, active, whole = PUBLISHED[model]
    found = architecture_of(load([CURRICULUM, MODELS / f"{model}.toml"]).model)
    assert found.parts is not None
    assert found.parameters is not None
    assert found.active_parameters is not None
    assert found.parts["decoder"] == decoder
    beside = found.parameters - found.parts["decoder"]
    assert found.active_parameters - beside == pytest.approx(active, rel=0.01)
    assert found.parts["vision"] == pytest.approx(0.68e9, rel=0.01)  # 24 layers of AIMv2's, 1536 wide
    if whole is not None:  # of the report, to two digits
        assert found.parameters == pytest.approx(whole, rel=0.015)


@pytest.mark.parametrize("model", PUBLISHED)
def test_sizes_are_those_of_the_model_that_is_built(model: str) -> None:
    """The real classes, without memory for weights."""
    import torch
    from transformers import CONFIG_MAPPING

    from rlhf.bridge import BridgeConfig, BridgeForConditionalGeneration, BridgeMoeForConditionalGeneration

    architecture = architecture_of(load([CURRICULUM, MODELS / f"{model}.toml"]).model)
    tables = architecture.tables
    own = {slot: {k: v for k, v in tables[slot].items() if k != "type"} for slot in ("vision", "decoder")}
    config = BridgeConfig(
        vision_config=CONFIG_MAPPING["aimv2_vision_model"](**own["vision"]),
        text_config=CONFIG_MAPPING[tables["decoder"]["type"]](**own["decoder"]),
        tiler=tables["tiler"],
        connector=tables["connector"],
        encoder=tables["encoder"],
        image_token_id=4,
    )
    with torch.device("meta"):
        built = (BridgeMoeForConditionalGeneration if architecture.experts else BridgeForConditionalGeneration)(config)
    built.tie_weights()
    assert sum(parameter.numel() for parameter in built.parameters()) == architecture.parameters


FITS = {
    "2b on a node": ("sail_vl2_2b", Cluster((H100,))),
    "2b with shorter rows on four small nodes": (
        "sail_vl2_2b", Cluster((SMALL,) * 4), "resources.transport = 'cpu'", "resources.max_model_len = 8192",
        "resources.token_budget = 8192", "resources.kv_cache_gib = 4", "resources.trainer_ranks = 8",
    ),
    "8b on a node": ("sail_vl2_8b", Cluster((H100,))),
    "8b on two nodes": ("sail_vl2_8b", Cluster((H100,) * 2), "resources.trainer_ranks = 8"),
    "30b on four nodes": ("sail_vl2_30b_a3b", Cluster((H100,) * 4)),
    "2b beside others": ("sail_vl2_2b", Cluster((Node(16, 60), Node(64, 500, 4, 39), H100))),
}  # fmt: skip
REFUSED = {
    "8b on one rank": (
        r"a trainer rank would need about 170\.\d GiB \(weights 33\.2, .*\), and a GPU has 79\.0",
        1, "sail_vl2_8b", Cluster((H100,)), "resources.trainer_ranks = 1",
    ),
    "8b in zero 2": (r"weights 33\.2", 1, "sail_vl2_8b", Cluster((H100,)), "resources.zero_stage = 2"),
    "8b that keeps activations": (
        r"activations [\d.]{4,}", 1, "sail_vl2_8b", Cluster((H100,)), "resources.checkpointing = false",
    ),
    "8b by NCCL": (r"copy to send 33\.2", 1, "sail_vl2_8b", Cluster((H100,)), "resources.transport = 'auto'"),
    "8b and a cache too large": (
        r"an engine would need about .*keys and values 60\.0", 1, "sail_vl2_8b", Cluster((H100,)),
        "resources.kv_cache_gib = 60",
    ),
    "8b and a cache too small": (
        r"kv_cache_gib = 2 does not hold the keys and values of one row of max_model_len = 20480 \(5\.62 GiB", 1,
        "sail_vl2_8b", Cluster((H100,)), "resources.kv_cache_gib = 2",
    ),
    "8b on nodes of two": (r"trainer_ranks = 4 on 2 GPUs", 2, "sail_vl2_8b", Cluster((Node(48, 400, 2, 79),))),
    "30b on a node": (r"trainer_ranks = 16 on 8 GPUs", 1, "sail_vl2_30b_a3b", Cluster((H100,))),
    "30b over nodes": (
        r"tensor_parallel = 16 on 8 GPUs of one node", 4, "sail_vl2_30b_a3b", Cluster((H100,) * 4),
        "resources.tensor_parallel = 16",
    ),
    "30b without room": (
        r"3 processes would share a GPU of the 4", 2, "sail_vl2_30b_a3b", Cluster((Node(96, 1800, 4, 79),)),
        "resources.trainer_ranks = 4", "resources.tensor_parallel = 4",
    ),
    "30b on nodes of one": (
        r"trainer_ranks = 16 on 1 GPUs", 4, "sail_vl2_30b_a3b", Cluster((Node(32, 900, 1, 139),)),
    ),
    "hosts that open it": (
        r"need about .* GiB of host memory, and a node with 8 trainer \(\d such\) has 620\.0", 4, "sail_vl2_30b_a3b",
        Cluster((Node(96, 620, 8, 79),) * 4),
    ),
    "what the recipe allows": (
        r"more than resources\.memory_gib = 100", 1, "sail_vl2_8b", Cluster((H100,)), "resources.memory_gib = 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FITS)
def test_fits(case: str) -> None:
    model, cluster, *overrides = FITS[case]
    started = time.process_time()
    made = plan(model, cluster, *overrides)
    assert time.process_time() - started < 1
    placed = {role: sum(dict(node.processes).get(role, 0) for node in made.nodes) for role in ("trainer", "rollout")}
    assert placed == {actor.role: actor.count for actor in made.actors if actor.role in placed}
    for node in made.nodes:
        assert node.memory_gib <= node.node.memory_gib
        assert len(node.gpus) <= node.node.gpus
        assert max(node.gpus, default=0) <= (node.node.gpu_memory_gib or 0)
    assert "Nodes, each" in describe(made)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_would_fit(case: str) -> None:
    """The advice is itself planned on the nodes it speaks of."""
    words, nodes, model, cluster, *overrides = REFUSED[case]
    started = time.process_time()
    with pytest.raises(PlanError, match=words) as caught:
        plan(model, cluster, *overrides)
    assert time.process_time() - started < 2
    error = caught.value
    assert "it would fit" in str(error)
    assert error.nodes == nodes
    assert all(change in str(error) for change in error.changes)
    assert error.changes or nodes > len(cluster.nodes)
    grown = Cluster(cluster.nodes + (cluster.nodes[0],) * (nodes - len(cluster.nodes)))
    made = plan(model, grown, *overrides, *error.changes)
    assert f"of a trainer rank needs {made.memory.trainer:.1f} GiB then" in str(error)
    if nodes > len(cluster.nodes) + 1:
        fewer = Cluster(grown.nodes[:-1])
        with pytest.raises(PlanError):
            plan(model, fewer, *overrides, *error.changes)
    for left in error.changes:  # none of them is idle
        with pytest.raises(PlanError):
            plan(model, grown, *overrides, *(change for change in error.changes if change != left))


def test_the_mildest_change_is_told() -> None:
    def told(*overrides: str) -> tuple[str, ...]:
        with pytest.raises(PlanError) as caught:
            plan("sail_vl2_8b", Cluster((H100,)), *overrides)
        return caught.value.changes

    assert told("resources.zero_stage = 2") == ("resources.zero_stage = 3",)
    assert told("resources.checkpointing = false") == ("resources.checkpointing = true",)
    assert told("resources.trainer_ranks = 1") == ("resources.trainer_ranks = 4",)
    assert told("resources.transport = 'auto'") == ('resources.transport = "shm"',)
    assert told("resources.kv_cache_gib = 60") == ("resources.kv_cache_gib = 30.0",)
    assert told("resources.memory_gib = 100") == ("resources.memory_gib = 175",)
    assert set(told("resources.checkpointing = false", "resources.zero_stage = 2")) == {
        "resources.checkpointing = true",
        "resources.zero_stage = 3",
    }


def test_what_no_cluster_of_such_nodes_can_do() -> None:
    with pytest.raises(
        PlanError, match=r"nothing in \[resources\] would make it fit, .* even then: .*would need"
    ) as one:
        plan("sail_vl2_30b_a3b", Cluster((Node(16, 900, 2, 23.5),) * 2))
    assert (one.value.changes, one.value.nodes) == ((), 0)
    with pytest.raises(PlanError, match=r"even then: a trainer rank would need about .*activations 35\.0"):
        plan("sail_vl2_8b", Cluster((SMALL,) * 4))  # one row of 20,480 tokens is too much for such a GPU


def test_weights_on_their_way_lie_where_the_transport_has_them() -> None:
    """Over Ray's object store on every node that has an engine; by NCCL on the first rank's GPU alone."""
    engines, first, second = plan("sail_vl2_30b_a3b", Cluster((H100,) * 4)).nodes
    weights = 4 * 31_230_947_840 / 2**30
    assert [dict(node.processes).get("trainer", 0) for node in (engines, first, second)] == [0, 8, 8]
    assert engines.memory_gib == pytest.approx(0.5 + 2 * 4 * 1.3 + 0.3 + weights)  # Ray, two engines, a reward worker
    assert second.memory_gib == pytest.approx(0.5 + 8 * (1.0 + weights))
    assert first.memory_gib == pytest.approx(second.memory_gib + 0.6 + weights)  # the driver, and what it publishes
    sent = plan("sail_vl2_2b", Cluster((H100,)))
    assert sent.transport == "nccl"
    (node,) = sent.nodes
    copy = 4 * 2_419_400_192 / 2**30
    assert node.gpus[0] == pytest.approx(sent.memory.trainer)
    assert node.gpus[1:4] == pytest.approx([sent.memory.trainer - copy] * 3)
    assert node.gpus[4:] == pytest.approx([sent.memory.engine] * 2)
    assert node.memory_gib < 4 * (1 + copy) + 10  # and none on the host


def test_ray_packs_the_largest_bundle_first() -> None:
    nodes = (Node(4, 8), Node(8, 8, 4), Node(8, 8, 8))
    wide, single, core = {"CPU": 1.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}
    # the two wide ones fill the node of eight; single ones go to the other, and cores where there is room left
    assert packed([single, wide, core, wide], nodes) == [1, 2, 2, 2]
    assert packed([wide] * 4, nodes) == [2, 2, 1, None]
    assert packed([{"CPU": 9.0}], nodes) == [None]
    assert packed([core] * 20, nodes).count(1) == 8


def test_processes_of_a_role_stand_together_whatever_ray_did_with_bundles_that_are_alike() -> None:
    card, core = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}
    places = {"trainer": [0, 1, 2], "rollout": [3, 4], "reward": [5]}
    found = gathered([card] * 5 + [core], places, ["b", "a", "b", "a", "b", "a"])
    assert found == {"trainer": [0, 2, 4], "rollout": [1, 3], "reward": [5]}


def test_shares_of_cores_leave_room_for_every_process() -> None:
    """Four processes on three cores, each of another node: with three quarters each a node would hold one."""
    made = make_plan(load([CURRICULUM]), Cluster((Node(1, 24),) * 3))
    assert sum(actor.count for actor in made.actors) == 4
    assert {actor.cpus for actor in made.actors} == {0.5}
    assert sum(count for node in made.nodes for _, count in node.processes) == 4
    assert made.transport == "cpu"


@pytest.mark.parametrize("site", sorted(SITES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_site_is_taken_as_its_comment_says(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"^#   rlhf ((?:plan|submit) .*)$", site.read_text(), re.MULTILINE)
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    shown = {"laptop": "Actors", "kuberay": "kind: RayJob", "slurm": "#SBATCH --nodes=2"}
    assert shown.get(site.stem, "Nodes, each") in printed


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_model_is_planned_as_its_comment_says(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"^#   rlhf (plan .*)$", (MODELS / f"{model}.toml").read_text(), re.MULTILINE)
    assert main(command.split()) == 0
    assert "on the GPU of a trainer rank" in capsys.readouterr().out


def test_a_site_file_says_what_machines_there_are_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.toml"
    site.write_text("[cluster]\nqueue = 'gpus'\n")
    assert load([CURRICULUM], site=site).cluster.queue == "gpus"  # enough to be submitted somewhere
    assert main(["plan", str(CURRICULUM), "--cluster", str(site)]) == 2
    assert "site.toml: it does not say what machines there are; write [cluster] with" in capsys.readouterr().err
    for text, words in {
        "cluster = 3\n": r"site\.toml: a site file says where jobs run; write \[cluster\] with",
        "nodes = 3\n": r"site\.toml: a site file holds \[cluster\] alone, and this one nodes too",
        "[resources]\nlr = 1\n[cluster]\nnodes = [{cpus = 1, memory_gib = 1}]\n": r"and this one resources too",
        "[cluster]\nnodes = [{cpus = 1, memory = 1}]\n": r"site\.toml: unknown key 'cluster\.nodes\.0\.memory'",
    }.items():
        site.write_text(text)
        with pytest.raises(RecipeError, match=words):
            load([CURRICULUM], site=site)
    with pytest.raises(RecipeError, match=r"nowhere\.toml: cannot be read"):
        load([CURRICULUM], site=tmp_path / "nowhere.toml")
    site.write_text(
        "[cluster]\nnodes = [{count = 2, cpus = 3, memory_gib = 5}, {cpus = 1, memory_gib = 1, gpus = 1}]\n"
    )
    found = Cluster.of(load([CURRICULUM], ["cluster.queue = 'mine'"], site).cluster)
    assert found == Cluster((Node(3, 5), Node(3, 5), Node(1, 1, 1)))
    assert (found.cpus, found.memory_gib, found.gpus, found.most_gpus, found.gpu_memory_gib) == (7, 11, 1, 1, None)
