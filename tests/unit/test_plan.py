"""The plan's arithmetic."""

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
    PlanError,
    Verdict,
    describe,
    installed_versions,
    make_plan,
    read_verdicts,
    reserved,
)
from rlhf.recipe import load
from tests.unit.toy_recipe import LAPTOP, RANKED, TOY, plan

ROOT = Path(__file__).parents[2]


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


def test_a_check_needs_no_name_that_a_source_may_have() -> None:
    from actors.check import _narrowed, _serving

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.toml"
        path.write_text(TOY.replace("\nheldout = ", "\nrows = ").replace('data = "heldout"', 'data = "rows"'))
        narrowed = _narrowed(load([path]))
    assert make_plan(_serving(narrowed), LAPTOP).cold_starts == 1


def test_a_judge_is_asked_about_all_rows_it_is_measured_on() -> None:
    assert plan("data.verdicts-heldout.rows = 700").stages[1].evaluation_rollouts == 700
    extra = plan("stages.align.eval_data = 'verdicts-heldout'").stages[0].evaluation_rollouts
    assert extra == 2 * 100 * 5 + 100


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
