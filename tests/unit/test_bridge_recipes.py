"""The recipes of published systems: what they state at full size, and that one file makes each of them small."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.architecture import architecture_of, geometry_of
from rlhf.models import bridges_of
from rlhf.plan import Cluster, Node, PlanError, make_plan
from rlhf.recipe import RecipeError, load

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in (FOLDER / "bridges").glob("*.toml"))
TOY = FOLDER / "sizes" / "toy.toml"
# tokens of a picture of (width, height), as the papers state them
TOKENS = {
    "llava": {(500, 375): 256},
    "llava15": {(500, 375): 576},
    "llava_next": {(672, 672): 576 + 48 * 49, (336, 1344): 576 + 96 * 25, (1344, 336): 576 + 24 * 97},
    # seven times 64, a comma or a new line after each of six slices: less than LLaVA-1.5's 576
    "llava_uhd": {(672, 1008): 448 + 6, (336, 336): 64},
    "flamingo": {(500, 375): 64},
    "mimic_it": {(500, 375): 64},
    "next_gpt": {(500, 375): 1},
    "blip2": {(500, 375): 32},
    "blip2_t5": {(500, 375): 32},
    "instructblip": {(500, 375): 32},
    "llavar": {(500, 375): 576 + 2},
    "svit": {(500, 375): 576},
    "qwen_vl": {(500, 375): 256 + 2},
    "internlm_xcomposer": {(500, 375): 64 + 2},
    "cogvlm": {(500, 375): 256 + 2},
    "monkey": {(896, 896): 5 * 256 + 2},
    "llama_vid": {(500, 375): 1 + 256},
    "moe_llava": {(500, 375): 576},
    "yi_vl": {(500, 375): 256},
    "sail_vl2": {(448, 448): 256 + 2, (896, 448): 3 * 256 + 2},
    "lavin": {(500, 375): 6},
    "otterhd": {(1920, 1080): 64 * 36 + 36, (300, 300): 10 * 10 + 10},
}


def test_every_recipe_states_its_tokens():
    assert sorted(TOKENS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_at_full_size_are_the_papers(name):
    recipe = load([FOLDER / "bridges" / f"{name}.toml"])
    geometry = geometry_of(architecture_of(recipe.model).tables)
    for size, tokens in TOKENS[name].items():
        assert len(geometry.pattern(geometry.layout(*size))) == tokens, size
    assert geometry.most_tokens < recipe.resources.max_model_len


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_small(name):
    """All its own stages and the four of thinking, on two cores."""
    full, toy = load([FOLDER / "bridges" / f"{name}.toml"]), load([FOLDER / "bridges" / f"{name}.toml", TOY])
    own = [stage.name for stage in full.stages]
    thinking = ["long-cot", "rl-verifiable", "judge", "think-fusion", "rl-mixed"]
    assert [stage.name for stage in toy.stages] == own + thinking
    for stage in full.stages:  # what trains is what the paper trains
        small = next(other for other in toy.stages if other.name == stage.name)
        assert getattr(small, "train", None) == getattr(stage, "train", None)
        assert getattr(small, "steps", 0) <= 2
    slots = {slot: table["type"] for slot, table in full.model.bridge.items()}
    assert slots == {slot: table["type"] for slot, table in toy.model.bridge.items()}
    make_plan(toy, Cluster((Node(cpus=2, memory_gib=24),)))  # raises where it could not run
    parameters = architecture_of(toy.model).parameters
    assert parameters is not None
    assert parameters < 500_000


def test_sizes_change_only_what_a_bridge_has(tmp_path):
    base = tmp_path / "base.toml"
    base.write_text(
        'name = "a"\n[model.bridge]\nvision = { type = "clip", hidden_size = 8 }\n'
        'tiler = { type = "grid", tile = 336, grids = [[2, 2]] }\ndecoder = { type = "qwen3" }\n'
        '[[stages]]\nname = "s"\nkind = "sft"\ndata = { a = 1 }\nsteps = 9\nbatch_size = 9\n'
        '[[stages]]\nname = "t"\nkind = "evaluate"\n'
    )
    over = [
        "model.sizes.tiler.grid = { tile = 48, max_tiles = 4 }",
        "model.sizes.tiler.single = { size = 48 }",
        "model.sizes.vision.clip = { hidden_size = 4 }",
        "stages.'*'.sft = { steps = 2 }",
    ]
    found = load([base], over)
    assert found.model.bridge["tiler"] == {"type": "grid", "tile": 48, "grids": [[2, 2]]}
    assert found.model.bridge["vision"] == {"type": "clip", "hidden_size": 4}
    assert [getattr(stage, "steps", None) for stage in found.stages] == [2, None]
    assert found.stages[0].batch_size == 9
    with pytest.raises(RecipeError, match="tables by kind, and 'steps' is none of sft, preference"):
        load([base], ["stages.'*'.steps = 2"])
    assert "connector" not in load([base], ["model.sizes.connector.mlp = { hidden = 4 }"]).model.bridge
    mixed = load([base], ["stages.'*'.sft.data.b = 0.3"])
    assert mixed.stages[0].data == {"a": 1, "b": 0.3}  # one key, as for a stage by its name
    with pytest.raises(RecipeError, match=r"sizes\.vision holds no tables"):
        load([base], ["model.sizes.vision = 3"])
    with pytest.raises(RecipeError, match=r"\[model.sizes.SLOT.TYPE\] tables"):
        load([base], ["model.sizes = 3"])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llava", "stages.align.objectives = { itc = 1.0 }", "objectives need a Q-Former with their heads"),
        (
            "llava",
            "stages.align.objectives = { contrast = 1.0 }",
            "contrast compares pictures with",
        ),
        ("flamingo", "stages.contrast.train = { 'language_model.*' = 1e-4 }", "`train` names neither; add one"),
        ("blip2", "stages.represent.train = { 'language_model.*' = 1e-4 }", "`train` names neither; add one"),
        ("blip2", "stages.represent.upcycle = { num_experts = 2, top_k = 1 }", "leave `evaluate`, `upcycle`, `lora`"),
        ("blip2", "stages.queries = { remove = true }", 'put a stage of kind "rebuild" before this one'),
        ("blip2", "stages.represent.signals = 1.0", "signals are its own; give each a stage"),
        ("llava", "stages.align.signals = 1.0", "signals need a head that reads them"),
        ("qwen_vl", "stages.at-448.parts.vision.artifact = 'pretrein'", "did you mean 'pretrain'"),
        ("qwen_vl", "stages.at-448.parts.vision.path = 'nowhere'", "parts.vision.path = 'nowhere': no such folder"),
        ("qwen_vl", "stages.at-448.bridge.tiller = { size = 4 }", "bridge has no slot 'tiller'"),
        ("qwen_vl", "stages.at-448.sizes.tiler.size = 60", "stage 'at-448': model.bridge: tiles are \\(60, 60\\)"),
        ("flamingo", "model.bridge.decoder.num_hidden_layers = 3", "num_hidden_layers follows from its own keys"),
        (
            "llava15",
            "model.bridge.packer = { type = 'segments', positions = 'none' }",
            'positions = "each" is all that',
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(name, change, says):
    recipe = load([FOLDER / "bridges" / f"{name}.toml", TOY], [change])
    with pytest.raises(PlanError, match=says):
        make_plan(recipe, Cluster((Node(cpus=2, memory_gib=24),)))


def test_shapes_that_differ_are_not_sharded_by_zero_3():
    files = [FOLDER / "bridges" / "llava_uhd.toml", TOY]
    two = ["resources.trainer_ranks = 2", "resources.trainer_threads = 1"]
    laptop = Cluster((Node(cpus=2, memory_gib=24),))
    make_plan(load(files, [*two, "resources.zero_stage = 2"]), laptop)
    with pytest.raises(PlanError, match=r"stage 'align' and \d+ more: tiles of this bridge differ in shape"):
        make_plan(load(files, [*two, "resources.zero_stage = 3"]), laptop)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_a_node_of_eight_gpus(name):
    recipe = load([FOLDER / "bridges" / f"{name}.toml"])
    rows = [f"data.{source} = {{ builder = 'digits', table = 'direct' }}" for source in recipe.data]
    make_plan(load([FOLDER / "bridges" / f"{name}.toml"], rows), Cluster((Node(128, 1024, 8, 80.0),)))


def test_a_head_that_was_removed_is_gone():
    first, *_, last = bridges_of(load([FOLDER / "bridges" / "flamingo.toml", TOY]))
    assert first["head"]["type"] == "contrast"
    assert "head" not in last
