"""Recipes compose left to right, overrides come last, and every mistake names its file and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf.recipe import RecipeError, Sft, load

BASE = """
name = "base"
seed = 1
[model]
path = "org/model"
[resources]
trainer_threads = 1
rollout_threads = 1
[data]
train = {builder = "digits", table = "chains"}
[[stages]]
name = "first"
kind = "sft"
data = {rows = 1}
steps = 10
batch_size = 4
[[stages]]
name = "second"
kind = "evaluate"
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.toml"
    path.write_text(BASE)
    return path


def write(folder: Path, text: str) -> Path:
    path = folder / "over.toml"
    path.write_text(text)
    return path


def test_defaults_come_from_the_schema(base: Path) -> None:
    recipe = load([base])
    assert recipe.resources.zero_stage == 2
    assert recipe.stages[0].evaluate == "none"


def test_later_files_win_key_by_key(base: Path, tmp_path: Path) -> None:
    recipe = load([base, write(tmp_path, "seed = 2\n[resources]\ntrainer_threads = 3\n")])
    assert (recipe.seed, recipe.resources.trainer_threads, recipe.resources.rollout_threads) == (2, 3, 1)


def test_stages_merge_by_name(base: Path, tmp_path: Path) -> None:
    over = '[[stages]]\nname = "first"\nsteps = 20\n[[stages]]\nname = "third"\nkind = "evaluate"\n'
    recipe = load([base, write(tmp_path, over)])
    first = recipe.stages[0]
    assert isinstance(first, Sft)
    assert (first.steps, first.batch_size) == (20, 4)
    assert [stage.name for stage in recipe.stages] == ["first", "second", "third"]


def test_a_stage_can_be_removed(base: Path, tmp_path: Path) -> None:
    recipe = load([base, write(tmp_path, '[[stages]]\nname = "second"\nremove = true\n')])
    assert [stage.name for stage in recipe.stages] == ["first"]


def test_overrides_come_last(base: Path, tmp_path: Path) -> None:
    over = write(tmp_path, '[[stages]]\nname = "first"\nsteps = 20\n')
    first = load([base, over], ["stages.first.steps = 30", "resources = {zero_stage = 3}"]).stages[0]
    assert isinstance(first, Sft)
    assert first.steps == 30


def test_an_unknown_key_names_the_nearest(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'resources.trainer_thread'; did you mean 'trainer_threads'"):
        load([base], ["resources.trainer_thread = 1"])
    with pytest.raises(RecipeError, match=r"unknown key 'stages.first.batch_sise'; did you mean 'batch_size'"):
        load([base], ["stages.first.batch_sise = 1"])


def test_an_override_of_an_unknown_stage_lists_them(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"no stage named 'third'; the stages are first, second"):
        load([base], ["stages.third.steps = 1"])


def test_every_problem_is_told_at_once(base: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load([base], ["stages.first.steps = 0", "resources.memory_gib = -1"])
    assert "stages.first.steps" in str(caught.value)
    assert "resources.memory_gib" in str(caught.value)


def test_a_mix_is_replaced_and_one_key_of_it_changed(base: Path, tmp_path: Path) -> None:
    recipe = load([base], ["stages.first.data = { more = 1.0 }"])
    assert recipe.stages[0].data == {"more": 1.0}
    recipe = load([base], ["stages.first.data.more = 1.0"])
    assert set(recipe.stages[0].data) > {"more"}
    over = write(tmp_path, "[stages.first]\ndata = { more = 1.0 }\ntrain = { 'x.*' = 1.0 }\n")
    recipe = load([base, over], ["stages.first.train.'y.*=z' = 2.0"])
    assert recipe.stages[0].data == {"more": 1.0}
    assert recipe.stages[0].train == {"x.*": 1.0, "y.*=z": 2.0}


def test_a_source_turns_from_builder_to_path_and_can_be_removed(base: Path) -> None:
    assert load([base], ["data.train = { path = 'a.jsonl' }"]).data["train"].builder is None
    assert load([base], ["data.train.path = 'a.jsonl'"]).data["train"].builder is None
    back = load([base], ["data.train.path = 'a.jsonl'", "data.train = { builder = 'digits', table = 'text' }"])
    assert (back.data["train"].path, back.data["train"].table) == (None, "text")
    assert load([base], ["data.train.rows = 7"]).data["train"].table == "chains"
    options = load([base], ["data.train.options = { remove = true }"]).data["train"].options
    assert options == {"remove": True}  # a builder's own
    assert "train" not in load([base], ["data.train.remove = true"]).data
    with pytest.raises(RecipeError, match=r"there is no data\.nothing to remove"):
        load([base], ["data.nothing.remove = true"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages = 'x'", "written [[stages]] with a `name` each"),
        ("stages = ['x']", "written [[stages]] with a `name` each"),
        ("stages.first = 3", "written [[stages]] with a `name` each"),
        ("stages = [{ name = ['a'] }]", "written [[stages]] with a `name` each"),
        ("stages.first.steps = 0", "override 'stages.first.steps = 0': stages.first.steps: "),
        ("stages.first.kind = 'sgt'", "stages.first: needs kind = 'evaluate', 'merge', 'preference'"),
        ("stages.first.lr = inf", "stages.first.lr: Input should be a finite number"),
        ("stages.first.data = 1", "stages.first.data must be a table"),
        ("stages.first.gates = [{ metric = 'm', min = 2, max = 1 }]", "min = 2 is above max = 1"),
        ("model.tokenizer.vocab_size = 10", "greater than or equal to 264"),
    ],
)
def test_an_override_that_cannot_be_is_named(base: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load([base], [override])
    assert said in str(caught.value)


def test_a_part_of_a_recipe_alone_says_what_it_is_for(base: Path, tmp_path: Path) -> None:
    part = write(tmp_path, "[evaluation]\nprompts = 4\n")
    with pytest.raises(RecipeError, match=r"over\.toml: model is missing; a part of a recipe is laid over a whole one"):
        load([part])
    with pytest.raises(RecipeError, match="lay this over a recipe that has it"):
        load([write(tmp_path, "[stages.first]\nsteps = 4\n"), base])
    latin = tmp_path / "latin.toml"
    latin.write_bytes("name = 'caf\xe9'".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.toml: not UTF-8"):
        load([latin])


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("[[cluster.nodes]]\ncpus = 8\n", "over.toml: cluster.nodes.0.memory_gib is missing"),
        ("[cluster.nodes]\ncpus = 8\n", "over.toml: cluster.nodes must be a list; write [[cluster.nodes]]"),
        ("[cluster.kuberay]\nsecrets = 'wandb'\n", "over.toml: cluster.kuberay.secrets must be a list; write […]"),
        ("[cluster]\nqueue = ''\n", "over.toml: cluster.queue is empty; give it a value, or leave it out"),
        (
            "[cluster.kuberay]\ntolerations = [{ efect = 'NoSchedule' }]\n",
            "over.toml: unknown key 'cluster.kuberay.tolerations.0.efect'; did you mean 'effect'?",
        ),
    ],
)
def test_a_mistake_in_a_site_file_is_told_of_that_file(base: Path, tmp_path: Path, site: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load([base], site=write(tmp_path, site))
    assert str(caught.value).replace(f"{tmp_path}/", "") == said


def test_a_missing_file_and_broken_toml_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.toml: cannot be read"):
        load([tmp_path / "absent.toml"])
    with pytest.raises(RecipeError, match=r"over\.toml: not valid TOML"):
        load([write(tmp_path, "seed = = 1")])
    with pytest.raises(RecipeError, match="no recipe given"):
        load([])


def test_a_model_has_one_source(base: Path) -> None:
    with pytest.raises(RecipeError, match="either `path`"):
        load([base], ["model.bridge = {}"])


def test_a_recipe_is_frozen(base: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load([base]).seed = 3


def test_a_stage_with_muon_is_not_clipped(base: Path, tmp_path: Path) -> None:
    over = '[[stages]]\nname = "first"\nmuon = { ratio = 20 }\n'
    stage = load([base, write(tmp_path, over)]).stages[0]
    assert isinstance(stage, Sft)
    assert stage.muon is not None
    assert (stage.muon.ratio, stage.muon.momentum) == (20, 0.95)
    with pytest.raises(RecipeError, match=r"clip_grad.*muon"):
        load([base, write(tmp_path, over + "clip_grad = 0.5\n")])


def test_a_rate_that_would_do_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    over = '[[stages]]\nname = "first"\ntrain = { "vision.*" = 1e-3 }\n'
    assert load([base, write(tmp_path, over)]).stages[0].train == {"vision.*": 1e-3}
    with pytest.raises(RecipeError, match=r"`lr` does nothing beside `train`"):
        load([base, write(tmp_path, over + "lr = 1e-4\n")])
    with pytest.raises(RecipeError, match=r"`train` names no parameters"):
        load([base, write(tmp_path, '[[stages]]\nname = "first"\ntrain = {}\n')])


def test_a_source_named_after_a_kind_of_stage_keeps_its_name_in_an_error(base: Path) -> None:
    with pytest.raises(RecipeError, match=r"override .*unknown key 'data.sft.row'; did you mean 'rows'"):
        load([base], ["data.sft.row = 3"])


def test_a_key_of_another_system_is_known_by_its_name_here(base: Path, tmp_path: Path) -> None:
    over = '[[stages]]\nname = "first"\nlearning_rate = 1e-4\nmax_new_tokens = 8\n'
    with pytest.raises(RecipeError, match=r"unknown key 'stages.first.learning_rate'; did you mean 'lr'") as caught:
        load([base, write(tmp_path, over)])
    assert "unknown key 'stages.first.max_new_tokens'\n" in f"{caught.value}\n"  # an SFT stage samples nothing


@pytest.mark.parametrize(
    ("kind", "lines", "says"),
    [
        ("rl", "alike = 'modality'", "`alike` is for the batches of stages that learn from rows"),
        ("rl", "mix = 'loss'", 'mix = "loss" weighs the losses of an sft stage'),
        ("sft", "alike = 'modality'\nmix = 'loss'", "take one of them"),
    ],
)
def test_how_a_stage_draws_must_suit_it(tmp_path, kind, lines, says):
    more = {
        "rl": "prompts_per_step = 4\nrewards.a.function = 'rewards.answer:boxed'",
        "sft": "batch_size = 4",
    }[kind]
    path = tmp_path / "base.toml"
    path.write_text(
        "name = 'a'\n[model]\npath = '.'\n[data.rows]\nbuilder = 'digits'\ntable = 'direct'\n"
        f"[[stages]]\nname = 's'\nkind = '{kind}'\ndata = {{ rows = 1 }}\nsteps = 1\n{more}\n{lines}\n"
    )
    with pytest.raises(RecipeError, match=re.escape(says)):
        load([path])


JUDGES = {
    "two models": ("artifact = 'first', endpoint = 'https://x/v1', model = 'm'", "give either `artifact`"),
    "no model": ("template = 'logic'", "give either `artifact`"),
    "an endpoint that is none": ("endpoint = 'x.org/v1', model = 'm'", "`endpoint` = 'x.org/v1' is no address"),
    "an endpoint's model": ("endpoint = 'https://x/v1'", "give `model`, the name of the one to ask"),
    "what only endpoints have": ("artifact = 'first', budget = 3, retries = 1", "'retries', 'budget' are of an"),
    "booleans without names": ("artifact = 'first', grammar = 'booleans'", '`fields` are the names of grammar = "bool'),
    "names without booleans": ("artifact = 'first', fields = ['a']", "`fields` are the names"),
    "a name twice": ("artifact = 'first', grammar = 'booleans', fields = ['a', 'a']", "names one twice"),
    "a confident score": ("artifact = 'first', grammar = 'score', confidence = 0.5", "`confidence` says when a yes"),
    "JSON of an engine": (
        "artifact = 'first', grammar = 'booleans', fields = ['a'], constrain = 'response_format'",
        'elsewhere take "structured_outputs"',
    ),
    "an unknown key": (
        "artifact = 'first', templat = 'logic'",
        "unknown key 'judges.j.templat'; did you mean 'template'",
    ),
}


@pytest.mark.parametrize("case", JUDGES)
def test_judges_that_are_none(base: Path, case: str) -> None:
    table, words = JUDGES[case]
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        load([base], [f"judges.j = {{{table}}}"])
    assert "judges.j" in str(caught.value)


def test_the_name_of_a_stage_is_a_judge_with_the_settings_of_judging(base: Path) -> None:
    recipe = load([base], ["judging = {max_tokens = 7, confidence = 0.5}", "judges.j = {artifact = 'first'}"])
    short = recipe.judge("first")
    assert (short.artifact, short.template, short.grammar) == ("first", "sound", "yes_no")
    assert (short.max_tokens, short.confidence, short.cache) == (7, 0.5, False)
    assert (recipe.judge("j").max_tokens, recipe.judge("j").cache) == (80, True)
