"""A stage that is all of a recipe; a small recipe of every kind of stage, and a plan of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlhf.plan import Cluster, Node, Plan, Verdict, make_plan
from rlhf.recipe import load

ONLY = """\
[[stages]]
name = "only"
kind = "sft"
data = {rows = 1}
steps = 1
batch_size = 1
"""
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
RANKED = (
    "data.pairs = {builder = 'digits', table = 'pairs'}",
    "data.pairs-heldout = {builder = 'digits', table = 'pairs', split = 'heldout'}",
    "stages.ranked = {kind = 'reward_model', data = {pairs = 1}, steps = 10, batch_size = 32}",
    "stages.ranked = {evaluate = 'pairs', eval_data = 'pairs-heldout'}",
    "stages.again = {kind = 'evaluate', start = 'ranked', evaluate = 'pairs', eval_data = 'pairs-heldout'}",
    "stages.practice = {kind = 'rl', data = {train = 1}, steps = 10, prompts_per_step = 16}",
    "stages.practice.rewards.liked = {scalar = 'ranked'}",
)


def plan(*overrides: str, cluster: Cluster = LAPTOP, text: str = TOY, verdicts: tuple[Verdict, ...] = ()) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.toml"
        path.write_text(text)
        return make_plan(load([path], overrides), cluster, verdicts)
