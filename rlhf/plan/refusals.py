"""Why a recipe cannot run on a machine, or with the model it has by then. What needs neither is in feasibility.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from rlhf.algorithms.table import method_of
from rlhf.architecture import Architecture, algorithm_of
from rlhf.plan.cluster import Cluster
from rlhf.plan.engines import is_served
from rlhf.plan.feasibility import nearest
from rlhf.recipe import Optimised, Rebuild, Recipe, Rl, Sft, Stage

# GSPO's ratio is a geometric mean over a row's tokens: it moves by 1e-4 to 1e-3 a step (2507.18071 clips at 3e-4, 4e-4)
GSPO_CLIP_LIMIT = 0.01
PARTS = ("vision", "connector", "packer", "head", "language_model", "lm_head")
# of the decoder, of towers, and of CogVLM's experts
LINEAR_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2"),
    *(f"vision_{name}_proj" for name in "qkvo"),
)


def unfit_stages(recipe: Recipe, architectures: Mapping[str, Architecture]) -> Iterator[str]:
    """Problems that depend on what the model is by the time of the stage; a problem of several stages once."""
    resources, found = recipe.resources, dict[str, list[str]]()
    for stage in recipe.stages:
        for problem in _unfit(recipe, stage, architectures[stage.name]):
            found.setdefault(problem, []).append(repr(stage.name))
    for problem, stages in found.items():
        yield f"stage {stages[0]}{f' and {len(stages) - 1} more' if len(stages) > 1 else ''}: {problem}"
    if resources.token_budget < resources.max_model_len:
        yield (
            f"resources.token_budget = {resources.token_budget} is less than resources.max_model_len = "
            f"{resources.max_model_len}: a longest row would fit no micro-batch; raise token_budget"
        )


def _unfit(recipe: Recipe, stage: Stage, architecture: Architecture) -> Iterator[str]:
    limit = recipe.resources.max_model_len
    algorithm = algorithm_of(stage, architecture) if isinstance(stage, Rl) else None
    if isinstance(stage, Rl) and algorithm is not None and method_of(stage, algorithm).objective == "gspo":
        widest = max(stage.clip_low or 0.0, stage.clip_high or 0.0)
        if widest > GSPO_CLIP_LIMIT:
            yield (
                f"a clip range of {widest:g} never binds for GSPO, whose ratio is a mean over the whole row; leave "
                "clip_low and clip_high out (3e-4 and 4e-4)"
            )
    head = architecture.tables.get("head", {}).get("type")
    if isinstance(stage, Sft) and stage.signals and head != "signals":
        yield 'signals need a head that reads them: give [model.bridge] head = { type = "signals", tokens = [...] }'
    aligned = architecture.tables.get("connector", {}).get("aligned", 0) if architecture.is_bridge else 0
    if isinstance(stage, Sft) and stage.objectives:
        if stage.objectives.keys() - {"contrast"} and not aligned:
            yield "objectives need a Q-Former with their heads: set connector.aligned = 256 and connector.text_length"
        if "contrast" in stage.objectives and head != "contrast":
            yield (
                "contrast compares pictures with what a text encoder makes of captions: give [model.bridge] "
                'head = { type = "contrast" }'
            )
        if not any(_may_match(glob, ("vision", "connector.reader")) for glob in stage.train or ("*",)):
            yield "objectives teach vision.* and connector.reader.*, and `train` names neither; add one"
        if stage.evaluate != "none" or stage.upcycle is not None or stage.lora is not None or stage.mix == "loss":
            yield (
                "objectives teach the connector, not the answers: leave `evaluate`, `upcycle`, `lora` and "
                'mix = "loss" out here'
            )
        if stage.signals:
            yield "objectives do not ask the decoder, and signals are its own; give each a stage"
    elif aligned and not isinstance(stage, Rebuild):
        yield (
            'connector.aligned is for a stage with `objectives`; put a stage of kind "rebuild" before this one, with '
            "bridge.connector.aligned = 0"
        )
    shards = recipe.resources.zero_stage == 3 and recipe.resources.trainer_ranks > 1
    if isinstance(stage, Optimised) and shards and architecture.shapes_differ:
        yield (
            "tiles of this bridge differ in shape, so ranks would call the encoder different numbers of times, and "
            "with resources.zero_stage = 3 wait for each other; use 2"
        )
    if isinstance(stage, Optimised) and architecture.is_bridge:
        yield from _nothing_trains(stage)
    reach = architecture.decoder.get("max_position_embeddings")
    if reach is not None and limit > reach:
        yield (
            f"resources.max_model_len = {limit} is beyond the decoder's max_position_embeddings = {reach}; "
            "lower the one or raise the other"
        )
    pictures = architecture.image_tokens
    for key, tokens in recipe.longest_replies(stage).items():
        if pictures is not None and tokens + pictures >= limit:
            yield (
                f"a picture of up to {pictures} tokens and {key} = {tokens} leave no room for the question in "
                f"resources.max_model_len = {limit}; raise it, or use fewer tiles"
            )


def unenforced(recipe: Recipe, architectures: Mapping[str, Architecture], implementation: str) -> Iterator[str]:
    """Judges that are to be held to their grammar by an engine that cannot."""
    for name, table in recipe.judges.items():
        made = table.artifact
        if table.constrain is None or made is None or made not in architectures:
            continue
        if "huggingface" in (implementation, architectures[made].served):
            yield (
                f"judges.{name}.constrain: the Hugging Face engine, which serves {made!r}, cannot hold "
                "replies to a grammar; leave it out, and replies that do not parse are failures"
            )


def _may_match(glob: str, parts: Sequence[str]) -> bool:
    """Whether a glob can match a name in one of these parts, as far as its plain beginning tells."""
    plain = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    return any(f"{part}.".startswith(plain) or plain.startswith(f"{part}.") for part in parts)


def _nothing_trains(stage: Optimised) -> Iterator[str]:
    """Names that are in no bridge; what lies deeper in its parts is looked up when the stage begins."""
    whole = stage.lora.whole if stage.lora is not None else []
    named = [("train", glob) for glob in stage.train or ()] + [("lora.whole", glob) for glob in whole]
    for key, glob in named:
        if not any(fnmatchcase(part, glob.partition(".")[0]) for part in PARTS):
            yield f"{key}: {glob!r} is in no part of the model; its parts are {', '.join(f'{p}.*' for p in PARTS)}"
    for name in stage.lora.target_modules if stage.lora is not None else ():
        if name.isidentifier() and name not in LINEAR_LAYERS:
            yield f"lora.target_modules: no layer is called {name!r}; {nearest(name, LINEAR_LAYERS)}"


def crowded_cores(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """Problems of a trainer that learns while engines sample on the same cores."""
    r = recipe.resources
    for stage in recipe.stages:
        if r.device != "cpu" or not isinstance(stage, Rl) or not stage.pipelined:
            continue
        if stage.replay is not None or not stage.learn:  # one of the two stands still
            continue
        trainer = r.trainer_ranks * r.trainer_threads_beside
        engines = (r.rollout_workers + len(recipe.judge_models(stage)) + len(stage.scalars)) * r.rollout_threads
        # processes of one thread share a core by turns; a team of threads waits for its slowest
        if trainer + engines > cluster.cpus and max(r.trainer_threads_beside, r.rollout_threads) > 1:
            yield (
                f"stage {stage.name!r}: with several updates a step or max_staleness the trainer learns while "
                f"engines sample; its {trainer} threads and their {engines} on {cluster.cpus} cores would wait for one "
                "another; lower resources.rollout_threads or trainer_threads_beside (1 is always allowed)"
            )


def undivided(recipe: Recipe, architectures: Mapping[str, Architecture]) -> Iterator[str]:
    """Problems of splitting a decoder over an engine's GPUs."""
    parallel = recipe.resources.tensor_parallel
    for name, architecture in architectures.items():
        heads = architecture.decoder.get("num_attention_heads", parallel)
        if heads % parallel:
            yield (
                f"resources.tensor_parallel = {parallel} does not divide the {heads} heads of the decoder of stage "
                f"{name!r}; use a number that does"
            )
            return


def unshared(recipe: Recipe, cluster: Cluster, tenants: int) -> Iterator[str]:
    """Problems of `tenants` processes that hold a GPU together."""
    r = recipe.resources
    if r.device == "cpu":
        return
    if tenants > 1 and r.tensor_parallel > 1:
        yield (
            f"{tenants} processes would share a GPU of the {cluster.gpus} here, which engines with "
            f"tensor_parallel = {r.tensor_parallel} cannot; use tensor_parallel = 1, or more GPUs"
        )
    if r.transport == "nccl" and tenants > 1:
        yield (
            f'resources.transport = "nccl": {tenants} processes would share a GPU of the {cluster.gpus} here, and two '
            'on one GPU can be in no NCCL group; use "auto", or more GPUs'
        )
    if r.transport == "ipc" and (tenants == 1 or r.trainer_ranks != cluster.gpus):
        yield (
            f'resources.transport = "ipc": an engine reads the weights of a trainer rank on its own GPU, and there are '
            f'{r.trainer_ranks} rank(s) for {cluster.gpus} GPU(s), {tenants} process(es) on each; use "auto"'
        )


def missing_gpus(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """Problems of how many GPUs there are."""
    r = recipe.resources
    if r.device == "cpu":
        return
    if r.trainer_ranks > cluster.gpus:
        yield f"resources.trainer_ranks = {r.trainer_ranks} on {cluster.gpus} GPUs; use at most {cluster.gpus}"
    if r.tensor_parallel > cluster.most_gpus:
        nodes = "" if len(cluster.nodes) == 1 else " of one node, which an engine does not go beyond"
        yield (
            f"resources.tensor_parallel = {r.tensor_parallel} on {cluster.most_gpus} GPUs{nodes}; use at most "
            f"{cluster.most_gpus}"
        )
    elif r.rollout_workers * r.tensor_parallel > cluster.gpus:
        yield (
            f"resources.rollout_workers × tensor_parallel = {r.rollout_workers * r.tensor_parallel} on "
            f"{cluster.gpus} GPUs; lower one of them"
        )


def misplaced(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    """Problems of placing the recipe on the machine."""
    r = recipe.resources
    if r.transport in ("ipc", "nccl") and r.device == "cpu":
        yield f'resources.transport = "{r.transport}" is for device = "cuda"; on a CPU use "auto", "shm" or "cpu"'
    if r.transport == "shm" and len(cluster.nodes) > 1:
        yield (
            f'resources.transport = "shm": the cluster has {len(cluster.nodes)} nodes, which share no memory; use '
            '"auto" or "cpu"'
        )
    if r.precision == "bfloat16" and any(is_served(stage) for stage in recipe.stages):
        yield (
            'resources.precision = "bfloat16": the proof after every publish knows a bound for float32 only, and would '
            'stop the run; use "float32"'
        )
    if r.precision == "bfloat16" and r.zero_stage == 0:
        yield (
            'resources.precision = "bfloat16" with zero_stage = 0 would add up gradients in half precision; raise '
            "zero_stage, from 1 on they add up in full"
        )
    if r.offload and r.zero_stage < 2:
        yield f"resources.offload needs zero_stage = 2 or 3, not {r.zero_stage}; raise it, or leave offload out"
    if r.device == "cpu":
        if r.tensor_parallel > 1:
            yield "resources.tensor_parallel needs GPUs; on CPU use 1 and raise rollout_threads"
    elif cluster.gpus == 0:
        yield 'resources.device = "cuda", but there is no GPU here; use device = "cpu", or a machine with one'
        return
    for key, number, threads in (
        ("trainer", r.trainer_ranks, r.trainer_threads),
        ("rollout", r.rollout_workers, r.rollout_threads),
    ):
        plural = "trainer_ranks" if key == "trainer" else "rollout_workers"
        if number * threads > cluster.cpus:
            yield (
                f"resources.{plural} × {key}_threads = {number * threads} threads on {cluster.cpus} cores would wait "
                f"for one another; lower {key}_threads to {max(cluster.cpus // number, 1)}"
                if number <= cluster.cpus
                else f"resources.{plural} = {number} on {cluster.cpus} cores; use at most {cluster.cpus}"
            )
