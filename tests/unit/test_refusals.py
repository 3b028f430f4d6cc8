"""Every recipe that a plan refuses, and what it says to change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf.plan import Cluster, Node, PlanError
from tests.unit.toy_recipe import RANKED, TOY, plan

REFUSALS = {
    "unknown source": ("stages.align.data = {trian = 1}", "data 'trian' is no [data] source.*did you mean 'train'"),
    "unknown start": ("stages.improve.start = 'cott'", "start = 'cott' is no stage; did you mean 'cot'"),
    "judges that talk": ("judging.max_tokens = 300", r"max_tokens \+ judging.max_tokens = \d+ leaves no room"),
    "later start": ("stages.align.start = 'cot'", "start = 'cot' comes later; move it"),
    "own start": ("stages.cot.start = 'cot'", "is the stage itself"),
    "start without a model": ("stages.improve.start = 'filtered'", "is a synthesize stage, which makes no model"),
    "later judge": ("stages.filtered.judge = 'improve'", "judge = 'improve' comes later"),
    "unknown judge": (
        "stages.improve.rewards.think.judge = 'jugde'",
        "judge = 'jugde' is no stage and no .judges. table; did you mean 'judge'",
    ),
    "a judge's own name": (
        "judges.judge = {artifact = 'judge'}",
        "judges.judge: a stage has this name too.*rename one",
    ),
    "a judge of an unknown stage": (
        "judges.j = {artifact = 'jugde'}\nstages.improve.rewards.think.judge = 'j'",
        "judges.j.artifact = 'jugde' is no stage; did you mean 'judge'",
    ),
    "a judge of a later stage": (
        "judges.j = {artifact = 'improve'}\nstages.filtered.judge = 'j'",
        "stage 'filtered': judges.j.artifact = 'improve' comes later",
    ),
    "a misspelt judge of a table": (
        "judges.outside = {artifact = 'judge'}\nstages.improve.rewards.think.judge = 'outsid'",
        "judge = 'outsid' is no stage and no .judges. table; did you mean 'outside'",
    ),
    "a judge without its key": (
        "judges.j = {endpoint = 'https://x/v1', model = 'm', template = 'logic', key_env = 'NO_SUCH_KEY'}\n"
        "stages.improve.rewards.think.judge = 'j'",
        "judges.j.key_env = 'NO_SUCH_KEY': the environment has no such variable; set it to the key of https://x/v1",
    ),
    "an unknown template": ("judges.j = {artifact = 'judge', template = 'logik'}", "judges.j.template: 'logik' is no"),
    "a template of three booleans": (
        "judges.j = {artifact = 'judge', template = 'think'}",
        "judges.j.template = 'think' is answered in grammar = .booleans.: give it and fields = ..logic., .grounding.",
    ),
    "other booleans than its template's": (
        "judges.j = {artifact = 'judge', template = 'think', grammar = 'booleans', fields = ['style']}",
        "judges.j.fields: template 'think' asks for .*, and not for 'style'; remove it",
    ),
    "a score of a judge that says yes or no": (
        "judges.j = {artifact = 'judge', grammar = 'score'}",
        "judges.j.template = 'sound' is answered in grammar = .yes_no.: give it$",
    ),
    "a judge's room": (
        "judges.j = {artifact = 'judge', max_tokens = 300}\nstages.improve.rewards.think.judge = 'j'",
        r"max_tokens \+ judges.j.max_tokens = \d+ leaves no room",
    ),
    "an engine that cannot hold to a grammar": (
        "judges.j = {artifact = 'judge', template = 'logic', constrain = 'structured_outputs'}\n"
        "stages.improve.rewards.think.judge = 'j'\nmodel.implementation = 'huggingface'",
        "judges.j.constrain: the Hugging Face engine, which serves 'judge', cannot hold replies to a grammar; leave it",
    ),
    "rows before they exist": ("stages.align.data = {filtered = 1}", "made by a later stage; move stage 'filtered'"),
    "rows from itself": ("stages.filtered.data = {filtered = 1}", "cannot be its own input"),
    "unknown evaluation data": ("evaluation.data = 'heldotu'", "evaluation.data = 'heldotu'.*did you mean 'heldout'"),
    "asking what was trained on": (
        "data.heldout.split = 'train'",
        "evaluation.data = 'heldout' is built from what 'train'.*data.heldout.split = \"heldout\"",
    ),
    "training on the test": ("stages.align.data = {heldout = 1}", "trains on 'heldout', the held-out questions"),
    "training on what was made of the test": (
        "stages.filtered.data = {heldout = 1}",
        "stage 'improve' trains on 'filtered', which asks 'heldout', the held-out questions",
    ),
    "critique without a critic": ("stages.filtered.method = 'critique'", 'method = "critique" needs a critic'),
    "critic without a critique": (
        "stages.filtered.critic = 'rewards.soundness:critique'",
        'method = "rejection" asks no critic',
    ),
    "judging after a part that is none": (
        "stages.improve.rewards.think.only_if = 'anser'",
        "only_if = 'anser' is no part that is asked first; did you mean 'answer'",
    ),
    "judging after a part that is never 1": (
        "stages.improve.rewards.think.only_if = 'answer'\nstages.improve.rewards.answer.clip = [0.0, 0.9]",
        "only_if = 'answer' asks whether it gave 1, as no scalar and no clip does",
    ),
    "an endpoint asked what only our judges know": (
        "judges.far = {endpoint = 'http://127.0.0.1:9/v1', model = 'm'}",
        "judges.far.template = 'sound' is what a judge of this system's was trained on",
    ),
    "a product of a part that is none": (
        "stages.improve.rewards.both = {product = ['answer', 'thnik']}",
        "rewards.both.product names 'thnik', no function or judge here; did you mean 'think'",
    ),
    "half precision": ("resources.precision = 'bfloat16'", 'knows a bound for float32 only.*use "float32"'),
    "half precision without zero": (
        "resources.precision = 'bfloat16'\nresources.zero_stage = 0",
        "would add up gradients in half precision",
    ),
    "more questions than rows": (
        "evaluation.prompts = 5000",
        "evaluation.prompts = 5000, but data.heldout has 1000 rows",
    ),
    "unknown eval_data": ("stages.judge.eval_data = 'verdict'", "eval_data 'verdict'.*did you mean 'verdicts'"),
    "loss without data": ("stages.align.evaluate = 'loss'", 'evaluate = "loss" needs eval_data'),
    "ranks over cores": ("resources.trainer_ranks = 4", "trainer_ranks = 4 on 2 cores; use at most 2"),
    "threads over cores": ("resources.rollout_threads = 3", "rollout_threads = 3 threads on 2 cores.*to 2"),
    "indivisible": ("stages.improve.updates_per_step = 3", "16 does not divide into.*each of whole.*multiple of 3"),
    "stale and uncorrected": (
        "stages.improve = {max_staleness = 1, algorithm = 'rloo'}",
        'max_staleness = 1 .*the objective "reinforce" does not correct',
    ),
    "threads side by side": (
        "resources.rollout_threads = 2",
        "'improve': with several updates.*the trainer learns while.*its 1 threads and their 4 on 2 cores",
    ),
    "a part no bridge has": (
        "stages.align.train = {'langage_model.*' = 1e-3}",
        r"stage 'align': train: 'langage_model\.\*' is in no part of the model; its parts are vision\.\*, connector",
    ),
    "a layer no bridge has": (
        "stages.align.lora = {rank = 4, target_modules = ['qproj']}",
        "stage 'align': lora.target_modules: no layer is called 'qproj'; did you mean 'q_proj'",
    ),
    "too few prompts": (
        "stages.improve = {prompts_per_step = 1, group_size = 2, updates_per_step = 4}",
        "prompts_per_step = 1 does not divide into updates_per_step = 4.*multiple of 4",
    ),
    "groups of one": ("stages.improve.group_size = 1", r'"auto" compares.*group_size = 1 leaves nothing.*take "ppo"'),
    "groups of one by a part": (
        "stages.improve = {group_size = 1, algorithm = 'ppo', advantage = 'leave_one_out'}",
        'advantage = "leave_one_out" compares.*or take "generalised" or "batch_normalised"',
    ),
    "updates over ranks": (
        "resources = {trainer_ranks = 2, trainer_threads = 1}\nstages.improve = {prompts_per_step = 6, group_size = 3}",
        "18 rollouts do not divide into updates_per_step = 2 times trainer_ranks = 2.*multiple of 4",
    ),
    "batch under ranks": (
        "resources = {trainer_ranks = 2, trainer_threads = 1}\nstages.align.batch_size = 1",
        "batch_size = 1",
    ),
    "no room for a prompt": ("stages.improve.max_tokens = 256", "max_tokens = 256 leaves no room for a prompt"),
    "no room in evaluation": ("evaluation.max_tokens = 300", "evaluation.max_tokens = 300 leaves no room"),
    "no room for the picture": ("stages.improve.max_tokens = 165", r"of up to 16 tokens and max_tokens \+ judg"),
    "budget under a row": ("resources.token_budget = 128", "token_budget = 128 is less than resources.max_model_len"),
    "cuda without gpus": ("resources.device = 'cuda'", "there is no GPU here"),
    "nccl on cpu": ("resources.transport = 'nccl'", 'is for device = "cuda"'),
    "tensor parallel on cpu": ("resources.tensor_parallel = 2", "tensor_parallel needs GPUs"),
    "a clip that never binds": ("stages.improve.clip_high = 0.2", "a clip range of 0.2 never binds for GSPO"),
    "same name as a source": (
        "data.filtered = {builder = 'digits', table = 'chains'}",
        "is both a [data] source and a",
    ),
    "budgets": (
        "budget_minutes = 1\nstages.align.budget_minutes = 2",
        "add up to 2 minutes, more than budget_minutes = 1",
    ),
    "memory": ("resources.memory_gib = 2", "more than resources.memory_gib = 2"),
    "top_k": ("stages.cot.upcycle = {num_experts = 2, top_k = 3}", "top_k = 3 is more than num_experts = 2"),
    "a wrong selector": (
        "data.capped = {builder = 'digits', table = 'chains', select = [{type = 'cap', rows = 'all'}]}",
        "data.capped.select, number 1: select.cap rows must be a whole number of at least 1, got 'all'",
    ),
    "uneven losses": (
        "stages.align.mix = 'loss'\nstages.align.batch_size = 7\nstages.align.data = {train = 1, verdicts = 1}",
        "cannot hold as many rows of each",
    ),
    "upcycling twice": ("stages.align.upcycle = {num_experts = 2, top_k = 1}", "its decoder already has 2 experts"),
    "upcycle with lora": ("stages.cot.lora = {rank = 4}", "use one of the two"),
    "unmeasured gate": ("stages.cot.gates = [{metric = 'eval.think.accuracy', min = 0.1}]", 'set evaluate = "modes"'),
    "unknown gate": ("stages.align.gates = [{metric = 'acuracy', min = 0.1}]", "which no stage measures"),
    "gate on a mode that is not asked": (
        "evaluation.modes = ['think']\nstages.align.gates = [{metric = 'eval.direct.accuracy', min = 0.1}]",
        'name "direct" in evaluation.modes',
    ),
    "other k": ("stages.align.gates = [{metric = 'eval.think.pass@8', min = 0.1}]", "evaluation.samples = 4"),
    "no soundness": ("stages.align.gates = [{metric = 'eval.think.soundness', min = 0.1}]", "names no function"),
    "no rewards": ("stages.improve.rewards.answer.function = 'boxed'", "is not written"),
    "misspelt reward": (
        "stages.improve.rewards.answer.function = 'rewards.answer:boxd'",
        "answer.py has no 'boxd'; did you mean 'boxed'",
    ),
    "reward of no module": (
        "stages.improve.rewards.answer.function = 'rewards.answr:boxed'",
        "no module 'rewards.answr' here",
    ),
    "misspelt format": ("evaluation.format = 'rewards.format:thinks_'", "has no 'thinks_'; did you mean 'thinks'"),
    "misspelt soundness": ("evaluation.soundness = 'no/such.py:f'", "evaluation.soundness = .* no such file"),
    "misspelt builder of one's own": ("data.train.builder = 'no_such_module:f'", "no module 'no_such_module' here"),
    "drawn like nothing": ("data.train.like = 'nothing'", "data.train.like = 'nothing': no source of its builder"),
    "loss that nobody measures": ("stages.filtered.evaluate = 'loss'", 'evaluate = "loss" needs the trainer'),
    "measured on what it learns": ("stages.judge.eval_data = 'verdicts'", "trains on 'verdicts', which it is measured"),
    "more rows than there can be": ("stages.filtered.min_rows = 100", "64 prompts give at most 64 rows"),
    "misspelt metric": (
        "stages.align.gates = [{metric = 'eval.think.acuracy', min = 0.1}]",
        "did you mean 'eval.think.accuracy'",
    ),
    "soundness without thinking": (
        "evaluation.soundness = 'rewards.soundness:digits'\n"
        "stages.align.gates = [{metric = 'eval.direct.soundness', min = 0.1}]",
        "'eval.direct.soundness', which no stage measures",
    ),
    "a temperature of an sft stage": (
        "stages.align.gates = [{metric = 'eval.think.accuracy.best', min = 0.1}]",
        "only an evaluate stage measures",
    ),
    "builder that is no module": ("data.train.builder = 'build.py:rows'", "make it a module"),
    "misspelt metric of the model": (
        "stages.align.gates = [{metric = 'model.paramters', min = 1}]",
        "did you mean 'model.parameters'",
    ),
    "beyond the positions": (
        "model.bridge.decoder.max_position_embeddings = 128",
        "'align' and 4 more: resources.max_model_len = 256 is beyond the decoder's max_position_embeddings = 128",
    ),
    "offload without zero": ("resources = {offload = true, zero_stage = 1}", "offload needs zero_stage = 2 or 3"),
    "width of no heads": ("model.bridge.vision.num_attention_heads = 5", "64 does not divide into num_attention_heads"),
    "width of words": ("model.bridge.decoder.hidden_size = 'x'", "hidden_size = 'x': give a whole number above 0"),
    "missing reward file": ("stages.improve.rewards.answer.function = 'no/such.py:f'", "no such file no/such.py"),
    "unknown builder": ("data.train.builder = 'digit'", "is unknown, did you mean 'digits'"),
    "implementation": ("model.implementation = 'vllm'", "vLLM has no bridge of its own"),
    "unknown slot": ("model.bridge.visoin = {type = 'siglip'}", "model.bridge has no slot 'visoin'"),
    "unfitting parts": ("model.bridge.tiler.size = 60", "position table is for"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_with_what_to_change(case: str) -> None:
    override, words = REFUSALS[case]
    with pytest.raises(PlanError, match=words.replace("[data]", r"\[data\]")):
        plan(*override.split("\n"))


def test_gpu_refusals() -> None:
    cluster = Cluster((Node(16, 128, gpus=2, gpu_memory_gib=0.5),))
    for override, words in {
        "resources.tensor_parallel = 4": "tensor_parallel = 4 on 2 GPUs",
        "resources.trainer_ranks = 4": "trainer_ranks = 4 on 2 GPUs",
        "resources.rollout_workers = 3": "on 2 GPUs; lower one",
        "resources.kv_cache_gib = 4": "a GPU has 0.5",
    }.items():
        with pytest.raises(PlanError, match=words):
            plan("resources.device = 'cuda'", override, cluster=cluster)


def test_held_out_rows_under_a_second_name_are_still_held_out(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    source = f"{{ path = '{rows}' }}"
    with pytest.raises(PlanError, match="'align' trains on 'again', the held-out questions"):
        plan(f"data.heldout = {source}", f"data.again = {source}", "stages.align.data = {again = 1}")


def test_names_are_found_without_running_what_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plans_only"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was run')\nfrom .inner import *\n")
    (package / "inner.py").write_text("def good(item): return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("plans_only.inner:good", "plans_only:good"):
        plan(f"stages.improve.rewards.answer.function = '{name}'")
    with pytest.raises(PlanError, match=r"inner.py has no 'god'; did you mean 'good'"):
        plan("stages.improve.rewards.answer.function = 'plans_only.inner:god'")
    (package / "broken.py").write_text("\ndef good(item) return 1.0\n")
    with pytest.raises(PlanError, match=r"broken.py:2 is not Python \(expected ':'\); correct that line"):
        plan("stages.improve.rewards.answer.function = 'plans_only.broken:good'")
    with pytest.raises(PlanError, match=r"no module 'plans_only\.outer' here"):
        plan("stages.improve.rewards.answer.function = 'plans_only.outer:good'")


def test_gates_on_what_only_the_data_can_name() -> None:
    for metric in ("eval.think.accuracy.number theory", "eval.direct.think_rate.easy", "eval.direct.pass@4"):
        plan(f"stages.align.gates = [{{metric = '{metric}', min = 0.1}}]")
    plan("stages.judge.gates = [{metric = 'judge.specificity.wrong count', min = 0.1}]")


def test_files_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    for name, words in {
        "empty.jsonl": "the file is empty",
        "rows.csv": "unknown kind of file; rows are .parquet, .jsonl",
        ".": "not a folder made by datasets.Dataset.save_to_disk",
    }.items():
        with pytest.raises(PlanError, match=words):
            plan(f"data.train = {{ path = '{tmp_path / name}' }}")


def test_a_stage_without_data() -> None:
    with pytest.raises(PlanError, match="stage 'align': data is empty"):
        plan(text=TOY.replace("data = {train = 1}", "data = {}", 1))


def test_two_stages_of_one_name() -> None:
    with pytest.raises(PlanError, match="two stages are called 'judge'"):
        plan(text=TOY.replace('name = "align"', 'name = "judge"'))


def test_evaluation_without_questions() -> None:
    with pytest.raises(PlanError, match=r"evaluation\.data is not given, but stage 'align'"):
        plan(text=TOY.replace('data = "heldout"', ""))


def test_paths_that_do_not_exist() -> None:
    with pytest.raises(PlanError, match=r"data.train.path = 'rows.parquet': no such file"):
        plan(text=TOY.replace('train = {builder = "digits", table = "chains"}', 'train = {path = "rows.parquet"}'))
    bridge = re.compile(r"\[model\.bridge\.vision\].*?\[data\]", re.S)
    for path, hub in (("./models/none", False), ("models", False), ("Qwen/Qwen3-VL-2B-Instruct", True)):
        text = bridge.sub(f'[model]\npath = "{path}"\n[data]', TOY).replace(
            "upcycle = {num_experts = 4, top_k = 2}", ""
        )
        if hub:
            made = plan(text=text)
            assert made.implementation == "vllm"
            assert any("not known before it is downloaded" in note for note in made.notes)
        else:
            with pytest.raises(PlanError, match="no such folder"):
                plan(text=text)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        plan("stages.align.data = {trian = 1}", "stages.improve.start = 'cott'")
    assert len(str(caught.value).splitlines()) == 2


def test_records_and_replays_fit_together(tmp_path: Path) -> None:
    record, improve = f"'{tmp_path / 'record'}'", "stages.improve"
    with pytest.raises(PlanError, match=r"holds 0 of the stage's \d+ steps; name the folder"):
        plan(f"{improve}.replay = {record}")
    made = plan(f"{improve}.record = {record}", f"{improve}.learn = false", f"{improve}.evaluate = 'none'")
    assert next(stage.optimizer_steps for stage in made.stages if stage.name == "improve") == 0
    for gate in ("sync_probe.max", "model.parameters", "logprob_gap.p999"):
        with pytest.raises(PlanError, match="which this stage does not measure"):
            plan(
                f"{improve}.record = {record}",
                f"{improve}.learn = false",
                f"{improve}.gates = [{{metric = '{gate}', max = 1.0}}]",
            )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.practice.rewards.liked.scalar = 'judge'", "scalar = 'judge' is no earlier reward_model stage; "),
        ("stages.practice.rewards.liked.scalar = 'rankde'", "did you mean 'ranked'"),
        ("stages.practice.start = 'ranked'", "scores replies and gives none; name a stage that trains a policy"),
        (
            "stages.practice.rewards.liked = {remove = true}\nstages.practice.rewards.a.judge = 'ranked'",
            "judge = 'ranked'",
        ),
        ("stages.ranked.evaluate = 'modes'", 'evaluate = "modes" asks a policy, and this is a reward model'),
        ("stages.again.evaluate = 'loss'", 'evaluate = "loss" asks a policy, and this is a reward model'),
        ("stages.align.evaluate = 'pairs'", 'evaluate = "pairs" measures a reward model; use it in'),
        ("stages.ranked.eval_data = 'pairs'", "trains on 'pairs', which it is measured on"),
        (
            "stages.cot.gates = [{metric = 'reward_model.accuracy', min = 0.5}]",
            'does not measure; set evaluate = "pairs" and eval_data',
        ),
        (
            "stages.ranked.gates = [{metric = 'reward_model.acuracy', min = 0.5}]",
            "did you mean 'reward_model.accuracy'",
        ),
    ],
)
def test_what_a_reward_model_is_not(override: str, words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        plan(*RANKED, *override.split("\n"))
