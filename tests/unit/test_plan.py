"""The plan's arithmetic, and every recipe it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlhf.plan import (
    Cluster,
    Node,
    Plan,
    PlanError,
    Verdict,
    describe,
    installed_versions,
    make_plan,
    read_verdicts,
    reserved,
)
from rlhf.recipe import load

ROOT = Path(__file__).parents[2]
LAPTOP = Cluster((Node(cpus=2, memory_gib=24),))
TOY = """
name = "toy"
[model.bridge.vision]
type = "siglip"
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
image_size = 48
patch_size = 12
[model.bridge.tiler]
type = "single"
size = 48
[model.bridge.decoder]
type = "qwen3"
hidden_size = 128
intermediate_size = 256
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
tie_word_embeddings = true
[data]
train = {builder = "digits", table = "chains"}
verdicts = {builder = "digits", table = "judge"}
verdicts-heldout = {builder = "digits", table = "judge", split = "heldout"}
heldout = {builder = "digits", table = "chains", split = "heldout"}
[evaluation]
data = "heldout"
prompts = 100
[[stages]]
name = "align"
kind = "sft"
data = {train = 1}
steps = 10
batch_size = 64
evaluate = "modes"
[[stages]]
name = "judge"
kind = "sft"
data = {verdicts = 1}
steps = 10
batch_size = 64
evaluate = "judge"
eval_data = "verdicts-heldout"
[[stages]]
name = "cot"
kind = "sft"
data = {train = 1}
steps = 10
batch_size = 64
upcycle = {num_experts = 4, top_k = 2}
[[stages]]
name = "filtered"
kind = "synthesize"
method = "rejection"
data = {train = 1}
prompts = 64
judge = "judge"
[[stages]]
name = "improve"
kind = "rl"
data = {filtered = 1}
steps = 10
prompts_per_step = 16
group_size = 8
updates_per_step = 2
evaluate = "modes"
[stages.rewards]
answer = {function = "rewards.answer:boxed"}
think = {judge = "judge"}
"""


def plan(*overrides: str, cluster: Cluster = LAPTOP, text: str = TOY, verdicts: tuple[Verdict, ...] = ()) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.toml"
        path.write_text(text)
        return make_plan(load([path], overrides), cluster, verdicts)


def test_batches_steps_and_rollouts() -> None:
    align, _, _, filtered, improve = plan().stages
    assert (align.optimizer_steps, align.rows_per_update, align.tokens_per_update) == (10, 64, 64 * 256)
    assert align.micro_batches == 2  # 8192 tokens hold 32 rows of 256
    assert (improve.optimizer_steps, improve.rows_per_update, improve.rollouts_per_step) == (20, 64, 128)
    assert improve.rollouts == 1280
    assert filtered.rollouts == 64 * 4
    assert align.evaluation_rollouts == 2 * 100 * 5


def test_models_are_chained_and_a_judge_is_nobodys_default() -> None:
    assert [stage.start for stage in plan().stages] == [None, "align", "align", "cot", "cot"]
    assert plan("stages.improve.start = 'align'").stages[-1].start == "align"


def test_algorithm_follows_the_decoder() -> None:
    assert plan().stages[-1].algorithm == "gspo"
    assert plan("stages.improve.start = 'align'").stages[-1].algorithm == "dapo"
    assert plan("stages.improve.algorithm = 'grpo'").stages[-1].algorithm == "grpo"


def test_engines_are_reused_by_architecture() -> None:
    made = plan()
    cold = {(stage.name, use.role): use.cold for stage in made.stages for use in stage.engines}
    assert cold == {
        ("align", "policy"): 1,
        ("judge", "policy"): 0,
        ("filtered", "policy"): 1,  # the upcycled decoder is first served here
        ("filtered", "judge judge"): 0,
        ("improve", "policy"): 0,
        ("improve", "judge judge"): 0,
    }
    assert made.cold_starts == 2


def test_a_judge_of_the_policys_architecture_needs_an_engine_of_its_own() -> None:
    made = plan("stages.improve.start = 'align'", "stages.filtered.start = 'align'")
    assert made.cold_starts == 2
    assert [use.cold for use in made.stages[3].engines] == [0, 1]


def test_shares_of_the_machine_add_up() -> None:
    made = plan()
    assert sum(actor.cpus * actor.count for actor in made.actors) <= LAPTOP.cpus
    assert {actor.role: actor.threads for actor in made.actors} == {"trainer": 2, "rollout": 1, "reward": 1}
    parts = sum(actor.memory_gib * actor.count for actor in made.actors)
    assert parts < made.memory.together < parts + 1.5  # the driver, Ray and one publish


def test_transport_and_placement_on_gpus() -> None:
    one, two = (Cluster((Node(16, 128, gpus, 80.0),)) for gpus in (1, 2))
    assert (plan().transport, plan().colocated) == ("shm", False)
    several = Cluster(LAPTOP.nodes * 3)
    assert plan(cluster=several).transport == plan("resources.transport = 'cpu'").transport == "cpu"
    with pytest.raises(PlanError, match=r"the cluster has 3 nodes, which share no memory"):
        plan("resources.transport = 'shm'", cluster=several)
    assert (made := plan("resources.device = 'cuda'", cluster=one)).transport == "ipc"
    # the policy's engine, the judge's and a trainer rank
    assert made.colocated
    assert [actor.gpus for actor in made.actors] == [0.33, 0.33, 0]
    assert [actor.gpus for actor in plan("resources.device = 'cuda'", cluster=two).actors] == [0.5, 0.5, 0]
    three = plan("resources.device = 'cuda'", cluster=Cluster((Node(16, 128, 3, 80.0),)))
    assert not three.colocated
    # two on one GPU share memory and no NCCL group; an engine beside no trainer rank shares no memory
    assert (three.transport, plan("resources.device = 'cuda'", cluster=two).transport) == ("nccl", "shm")
    with pytest.raises(PlanError, match=r'"nccl": 3 processes would share a GPU of the 1 here'):
        plan("resources = {device = 'cuda', transport = 'nccl'}", cluster=one)
    with pytest.raises(PlanError, match=r'"ipc": .* there are 1 rank\(s\) for 2 GPU\(s\), 2 process\(es\) on each'):
        plan("resources = {device = 'cuda', transport = 'ipc'}", cluster=two)
    assert [actor.gpus for actor in three.actors] == [1, 1, 0]
    with pytest.raises(PlanError, match=r"a trainer rank and 2 engine\(s\) awake on one GPU would need about"):
        plan("resources.device = 'cuda'", "resources.kv_cache_gib = 1", cluster=Cluster((Node(16, 128, 1, 1.5),)))
    with pytest.raises(PlanError, match=r"3 processes would share a GPU .* use tensor_parallel = 1"):
        plan("resources = {device = 'cuda', tensor_parallel = 2}", cluster=two)
    with pytest.raises(PlanError, match=r"3 processes would share a GPU"):  # how much memory it has is no matter
        plan("resources = {device = 'cuda', tensor_parallel = 2}", cluster=Cluster((Node(16, 128, 2, None),)))


def test_no_two_trainer_ranks_meet_on_one_gpu() -> None:
    two = Cluster((Node(16, 128, 2, 80.0),))
    made = plan("resources = {device = 'cuda', trainer_ranks = 2}", cluster=two)
    shares, bundles = reserved(made.actors, made.shared_gpus)
    assert [share.get("GPU") for share in shares] == [1, 1, None]
    assert bundles["trainer"] == [0, 1]
    assert bundles["rollout"] == [0, 1]
    assert sum(share["CPU"] for share in shares) <= two.cpus
    shares, bundles = reserved(plan().actors, plan().shared_gpus)
    assert bundles == {"trainer": [0], "rollout": [1, 2], "reward": [3]}
    assert all(set(share) == {"CPU"} for share in shares)


def test_verdicts_are_quoted_for_the_installed_versions_only() -> None:
    digest = plan().stages[0].architecture.digest
    proven = Verdict(digest, "transformers", 2.4e-6, True, installed_versions())
    assert plan(verdicts=(proven,)).stages[0].engines[0].verdict == "proven (log-prob gap 2.4e-06)"
    other = Verdict(digest, "transformers", 2.4e-6, True, (("vllm", "0.0.1"),))
    assert plan(verdicts=(other,)).stages[0].engines[0].verdict == "unproven"
    assert plan().stages[0].engines[0].verdict == "unproven"


def test_what_check_measured_chooses_the_implementation(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["OtherForConditionalGeneration"], "hidden_size": 8}')
    text = re.sub(r"(?ms)^\[model.*?(?=^\[(?!model))", f'[model]\npath = "{tmp_path}"\n\n', TOY)
    text = text.replace("upcycle = {num_experts = 4, top_k = 2}", "")
    digest = plan(text=text).stages[0].architecture.digest

    def chosen(**gaps: float) -> str:
        found = [Verdict(digest, name, gap, gap < 1e-4, installed_versions()) for name, gap in gaps.items()]
        return plan(text=text, verdicts=tuple(found)).implementation

    assert chosen() == "vllm"
    assert chosen(vllm=5e-7, transformers=0.2) == "vllm"
    assert chosen(vllm=0.3, transformers=1e-6) == "transformers"
    assert chosen(vllm=0.3) == "transformers"
    with pytest.raises(PlanError, match=r"vllm: refuted \(log-prob gap 3.0e-01\), transformers: refuted"):
        chosen(vllm=0.3, transformers=0.2)
    assert plan().implementation == "transformers"


def test_verdict_files(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    assert read_verdicts(path) == ()
    path.write_text(
        '[{"architecture": "a", "implementation": "vllm", "max_gap": 0.2, "proven": false, "versions": {"vllm": "1"}}]'
    )
    assert read_verdicts(path) == (Verdict("a", "vllm", 0.2, False, (("vllm", "1"),)),)
    path.write_text("[1]")
    with pytest.raises(PlanError, match=r"verdicts\.json: not a list of verdicts"):
        read_verdicts(path)


def test_description_names_every_stage() -> None:
    text = describe(plan())
    assert all(word in text for word in ("align", "judge", "cot", "filtered", "improve", "gspo", "2 engine cold start"))


def test_a_plan_is_fast_and_loads_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(TOY)
    code = (
        "import sys, time; from rlhf.recipe import load; from rlhf.plan import describe, make_plan, Cluster, Node; "
        f"here = Cluster((Node(2, 24),)); start = time.time(); describe(make_plan(load([{str(path)!r}]), here)); "
        "print(time.time() - start);"
        " print([m for m in ('torch', 'transformers', 'ray', 'vllm', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    seconds, loaded = done.stdout.split("\n")[:2]
    assert float(seconds) < 1
    assert loaded == "[]"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_plans(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load([recipe])
    cluster = Cluster((Node(16, 512, gpus=8, gpu_memory_gib=80),)) if loaded.resources.device == "cuda" else LAPTOP
    started = time.monotonic()
    assert make_plan(loaded, cluster).stages
    assert time.monotonic() - started < 5


def test_the_always_thinking_variant_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the stage that first learns to think it is the same as what it is compared with."""
    monkeypatch.chdir(ROOT)
    when = ROOT / "recipes" / "when_to_think_digits.toml"
    chooses, always = load([when]), load([when, ROOT / "recipes" / "variants" / "always_think.toml"])
    assert make_plan(always, LAPTOP).stages
    differing = [one.name for one, other in zip(chooses.stages, always.stages, strict=True) if one != other]
    assert differing == ["judge-sft", "rl-when"]
    assert always.stages[-1].rewards["judgement"].options == {"always": True}
    assert (always.data, always.model, always.evaluation) == (chooses.data, chooses.model, chooses.evaluation)


def test_the_score_judge_is_taught_on_what_makes_the_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    whole = ROOT / "recipes" / "think_fusion_digits.toml"
    base, laid = load([whole]), load([whole, ROOT / "recipes" / "variants" / "score_judge.toml"])
    assert make_plan(laid, LAPTOP).stages
    assert [stage.name for stage in laid.stages] == ["language", "vision", "align", "instruct", "score-judge"]
    assert laid.stages[:-1] == base.stages[:4]


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


def test_judges_that_share_a_model_share_an_engine_and_endpoints_need_none() -> None:
    tables = [
        "judges.logic = {artifact = 'judge', template = 'logic'}",
        "judges.facts = {artifact = 'judge', template = 'grounding'}",
        "judges.outside = {endpoint = 'https://x/v1', model = 'm', template = 'logic', max_tokens = 3000}",
    ]
    parts = ", ".join(f"{name} = {{judge = '{name}'}}" for name in ("logic", "facts", "outside"))
    made = plan(*tables, f"stages.improve.rewards = {{{parts}}}", "stages.improve.rewards.think = {remove = true}")
    assert [use.role for use in made.stages[-1].engines] == ["policy", "judge judge"]
    assert made.cold_starts == plan().cold_starts
    made = plan(tables[2], "stages.improve.rewards.think.judge = 'outside'")
    assert [use.role for use in made.stages[-1].engines] == ["policy"]
    assert "stage 'improve': judge 'outside' asks m at https://x/v1 about up to 1280 rollouts" in made.notes
    made = plan(tables[2], "judges.outside.budget = 30", "stages.improve.rewards.think.judge = 'outside'")
    assert "up to 30 rollouts" in made.notes[0]


def test_a_judge_with_its_key_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    asked = "judges.j = {endpoint = 'https://x/v1', model = 'm', template = 'logic', key_env = 'A_KEY'}"
    assert plan(asked, "stages.improve.rewards.think.judge = 'j'").stages
    monkeypatch.delenv("A_KEY")
    assert plan(asked).stages  # nobody asks it


def test_gpus_of_unknown_memory_are_noted() -> None:
    made = plan("resources.device = 'cuda'", cluster=Cluster((Node(16, 128, gpus=2),)))
    assert "note: whether GPUs have the memory was not checked: gpu_memory_gib of their nodes" in describe(made)
    made = plan("resources.device = 'cuda'", cluster=Cluster((Node(16, 128, gpus=2, gpu_memory_gib=80),)))
    assert "not checked" not in describe(made)


def test_the_minutes_of_a_stage_are_called_its_budget() -> None:
    assert "  budget_minutes" in describe(plan())


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


def test_gpus_are_those_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "0, GPU-aa, 81920\n1, GPU-bb, [N/A]\n2, GPU-cc, 40960\n"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 0, listed, ""))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (Cluster.here().gpus, Cluster.here().gpu_memory_gib) == (3, 40)
    for visible, gpus, memory in (
        *(("0", 1, 80), ("GPU-b,2", 2, 40), ("1", 1, None), ("", 0, None)),
        ("MIG-aa,MIG-bb", 2, None),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert (Cluster.here().gpus, Cluster.here().gpu_memory_gib) == (gpus, memory)


def test_offloaded_states_lie_in_host_memory() -> None:
    cluster = Cluster((Node(16, 128, gpus=2, gpu_memory_gib=80),))
    cuda = ("resources.device = 'cuda'", "resources.zero_stage = 2")
    held, offloaded = plan(*cuda, cluster=cluster), plan(*cuda, "resources.offload = true", cluster=cluster)
    moved = held.memory.trainer - offloaded.memory.trainer
    # 20 bytes a parameter: gradients twice, a copy of the weights, two moments; 16 on the host, where 4 were needed to
    # open the model
    assert moved > 0
    assert offloaded.memory.together - held.memory.together == pytest.approx(moved * 12 / 20)


def test_a_critic_is_a_second_model_to_hold() -> None:
    """Weights and gradients with the trainer, its optimizer's state where the policy's is."""
    cluster = Cluster((Node(16, 128, gpus=2, gpu_memory_gib=80),))
    cuda = ("resources.device = 'cuda'", "resources.zero_stage = 2", "resources.offload = true")
    ppo = "stages.improve.algorithm = 'ppo'"
    without, beside = (plan(*cuda, *more, cluster=cluster).memory for more in ((), (ppo,)))
    assert beside.trainer > without.trainer
    assert beside.together - without.together > beside.trainer - without.trainer


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


def test_a_check_needs_no_name_that_a_source_may_have() -> None:
    from actors.check import _narrowed, _serving

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.toml"
        path.write_text(TOY.replace("\nheldout = ", "\nrows = ").replace('data = "heldout"', 'data = "rows"'))
        narrowed = _narrowed(load([path]))
    assert make_plan(_serving(narrowed), LAPTOP).cold_starts == 1


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


def test_a_judge_is_asked_about_all_rows_it_is_measured_on() -> None:
    assert plan("data.verdicts-heldout.rows = 700").stages[1].evaluation_rollouts == 700
    extra = plan("stages.align.eval_data = 'verdicts-heldout'").stages[0].evaluation_rollouts
    assert extra == 2 * 100 * 5 + 100


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


RANKED = (
    "data.pairs = {builder = 'digits', table = 'pairs'}",
    "data.pairs-heldout = {builder = 'digits', table = 'pairs', split = 'heldout'}",
    "stages.ranked = {kind = 'reward_model', data = {pairs = 1}, steps = 10, batch_size = 32}",
    "stages.ranked = {evaluate = 'pairs', eval_data = 'pairs-heldout'}",
    "stages.again = {kind = 'evaluate', start = 'ranked', evaluate = 'pairs', eval_data = 'pairs-heldout'}",
    "stages.practice = {kind = 'rl', data = {train = 1}, steps = 10, prompts_per_step = 16}",
    "stages.practice.rewards.liked = {scalar = 'ranked'}",
)


def test_a_reward_model_is_a_process_of_its_own_and_nobodys_default() -> None:
    verified = "stages.practice.rewards = {liked = {remove = true}, right = {function = 'rewards.answer:boxed'}}"
    without, made = plan(*RANKED, verified), plan(*RANKED)
    stages = {stage.name: stage for stage in made.stages}
    assert [stages[name].start for name in ("ranked", "again", "practice")] == ["improve", "ranked", "improve"]
    assert (stages["ranked"].rows_per_update, stages["ranked"].optimizer_steps) == (64, 10)
    assert stages["ranked"].engines == ()
    actors = {actor.role: actor for actor in made.actors}
    assert "scalar" not in {actor.role for actor in without.actors}
    assert (actors["scalar"].count, actors["scalar"].threads, actors["scalar"].gpus) == (1, 1, 0)
    assert actors["scalar"].cpus < next(actor.cpus for actor in without.actors if actor.role == "reward")
    assert made.memory.together - without.memory.together == pytest.approx(actors["scalar"].memory_gib)
    assert "scalar" in describe(made)
    plan(*RANKED, "stages.ranked.gates = [{metric = 'reward_model.accuracy.wrong_digit', min = 0.5}]")
    plan(
        *RANKED,
        "stages.more = {kind = 'reward_model', start = 'ranked', data = {pairs = 1}, steps = 1, batch_size = 4}",
    )


def test_a_reward_model_holds_a_gpu_with_the_others() -> None:
    cluster = Cluster((Node(16, 128, gpus=2, gpu_memory_gib=80),))
    made = plan(*RANKED, "resources.device = 'cuda'", cluster=cluster)
    shares = {actor.role: actor.gpus for actor in made.actors if actor.count}
    # a rank, two kinds of engines and a reward model on two GPUs
    assert shares == {"trainer": 0.5, "rollout": 0.5, "reward": 0, "scalar": 0.5}
    assert made.colocated
    assert made.memory.scalar > 0
    # round the GPUs: the rank and the second kind of engines, the first kind and the reward model
    first, second = made.nodes[0].gpus
    assert first == pytest.approx(made.memory.trainer + made.memory.engine)
    assert second == pytest.approx(made.memory.engine + made.memory.scalar)
    small = Cluster((Node(16, 128, gpus=2, gpu_memory_gib=first - 1e-3),))
    with pytest.raises(PlanError, match=r"a trainer rank and 1 engine\(s\) awake on one GPU would need about"):
        plan(*RANKED, "resources.device = 'cuda'", cluster=small)
    (needed,) = plan(*RANKED, "resources.device = 'cuda'", cluster=Cluster((Node(16, 128, 1, 80),))).nodes[0].gpus
    small = Cluster((Node(16, 128, gpus=1, gpu_memory_gib=needed - 1e-3),))
    with pytest.raises(PlanError, match=r"a trainer rank, 1 reward model\(s\) and 2 engine\(s\) awake on one GPU"):
        plan(*RANKED, "resources.device = 'cuda'", cluster=small)


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
