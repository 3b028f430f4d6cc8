"""Why a recipe cannot run, in sentences that say what to change. Each check looks at one thing and yields problems."""

from __future__ import annotations

import ast
import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rewards.base import file_of
from rewards.templates import BUILT_IN, TemplateError, template_of
from rlhf.algorithms.table import estimator_of, method_of
from rlhf.bridge.decoders import own
from rlhf.recipe import (
    BUILDERS,
    Draws,
    Evaluate,
    Merge,
    Optimised,
    Pairs,
    Part,
    Rebuild,
    Recipe,
    RewardModel,
    Rl,
    Sft,
    Source,
    Stage,
    Synthesize,
    makes_model,
    trains,
)

ROW_FILES = (".parquet", ".jsonl", ".json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def problems(recipe: Recipe) -> Iterator[str]:
    """Everything wrong with names, data, stages and gates; nothing about machines."""
    yield from _names(recipe)
    yield from _model(recipe)
    yield from _sources(recipe)
    yield from _evaluation(recipe)
    yield from _judges(recipe)
    for stage in recipe.stages:
        if stage.name == "policy":
            yield "stage 'policy': the engine of a stage's own model is called so; rename the stage"
        for problem in _stage(recipe, stage):
            yield f"stage {stage.name!r}: {problem}"
    yield from _budget(recipe)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to suggest for an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(names)}" if names else "there are none"


def _names(recipe: Recipe) -> Iterator[str]:
    names = [stage.name for stage in recipe.stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two stages are called {name!r}; stage names are folders and must differ, so rename one"
    for stage in recipe.stages:
        if stage.kind == "synthesize" and stage.name in recipe.data:
            yield f"{stage.name!r} is both a [data] source and a synthesize stage, whose rows take its name; rename one"


def _model(recipe: Recipe) -> Iterator[str]:
    decoder = own(recipe.model.bridge.get("decoder", {})) if recipe.model.bridge is not None else None
    if decoder is not None and decoder.served != "vllm" and recipe.model.implementation in ("vllm", "transformers"):
        yield f'model.implementation: vLLM serves no {decoder.type} decoder; use "huggingface" or "auto"'
    elif recipe.model.bridge is not None and recipe.model.implementation == "vllm":
        yield 'model.implementation = "vllm": vLLM has no bridge of its own; use "transformers" or "auto"'
    if recipe.model.implementation == "huggingface" and recipe.resources.tensor_parallel > 1:
        yield 'model.implementation = "huggingface" is one process: set resources.tensor_parallel = 1'
    for what, path in (("model.path", recipe.model.path), ("model.tokenizer.path", recipe.model.tokenizer.path)):
        if path is not None:
            yield from _folder_or_hub(what, path)


def _folder_or_hub(what: str, path: str) -> Iterator[str]:
    # a name such as org/model may come from the hub, unless org is a folder here, where a typing error is likelier
    if not Path(path).is_dir() and (not HUB_NAME.fullmatch(path) or Path(path).parent.is_dir()):
        yield f"{what} = {path!r}: no such folder; give a model folder, or a hub name such as Qwen/Qwen3-VL-2B"


def _sources(recipe: Recipe) -> Iterator[str]:
    for name, source in recipe.data.items():
        if source.path is not None and not _is_elsewhere(recipe, Path(source.path)):
            yield from _file(f"data.{name}.path = {source.path!r}", Path(source.path))
        if source.builder is not None and ":" in source.builder:
            if source.builder.partition(":")[0].endswith(".py"):
                yield f'data.{name}.builder = {source.builder!r}: a builder is "module:function"; make it a module'
            else:
                yield from _function(f"data.{name}.builder", source.builder)
        elif source.builder is not None and source.builder not in BUILDERS:
            yield (
                f"data.{name}.builder = {source.builder!r} is unknown, {nearest(source.builder, BUILDERS)} "
                'Your own is written "module:function"'
            )
        origin = recipe.data.get(source.like or name)
        if origin is None or (source.like and origin.like) or _table(origin) != _table(source):
            yield (
                f"data.{name}.like = {source.like!r}: no source of its builder, table and split that draws rows of its "
                "own; name one that does, or remove it"
            )
        yield from _selectors(name, source)


def _selectors(name: str, source: Source) -> Iterator[str]:
    if not source.select and source.format is None:
        return
    from rlhf.data.formatters import FORMATTERS  # reads rows: a quarter of a second of imports
    from rlhf.data.selectors import SELECTORS

    if source.format is not None:
        try:
            FORMATTERS.make(source.format)
        except (TypeError, ValueError) as error:
            yield f"data.{name}.format: {error}"
    for place, table in enumerate(source.select, 1):
        try:
            SELECTORS.make(table)
        except (TypeError, ValueError) as error:
            yield f"data.{name}.select, number {place}: {error}"


def _is_elsewhere(recipe: Recipe, path: Path) -> bool:
    """Whether a path lies on the storage of a cluster, which is not mounted here: the job itself looks at it."""
    runs = recipe.cluster.runs
    return runs is not None and not Path(runs).exists() and path.is_relative_to(runs)


def _file(what: str, path: Path) -> Iterator[str]:
    if not path.exists():
        yield f"{what}: no such file or folder; correct the path or make the file first"
    elif path.is_dir() and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        yield f"{what}: not a folder made by datasets.Dataset.save_to_disk; name such a folder or a file of rows"
    elif path.is_file() and path.suffix not in ROW_FILES:
        yield f"{what}: unknown kind of file; rows are {', '.join(ROW_FILES)} or a Hugging Face dataset folder"
    elif path.is_file() and path.stat().st_size == 0:
        yield f"{what}: the file is empty; write its rows first"


def _evaluation(recipe: Recipe) -> Iterator[str]:
    yield from _function("evaluation.answer", recipe.evaluation.answer)
    yield from _function("evaluation.format", recipe.evaluation.format)
    if recipe.evaluation.soundness is not None:
        yield from _function("evaluation.soundness", recipe.evaluation.soundness)
    data = recipe.evaluation.data
    askers = [stage.name for stage in recipe.stages if stage.evaluate == "modes"]
    if data is None:
        if askers:
            yield f"evaluation.data is not given, but stage {askers[0]!r} evaluates both modes; name a [data] source"
        return
    if data not in recipe.data:
        yield f"evaluation.data = {data!r} is no [data] source; {nearest(data, recipe.data)}"
        return
    source = recipe.data[data]
    if askers and source.builder is not None and recipe.evaluation.prompts > source.rows:
        yield (
            f"evaluation.prompts = {recipe.evaluation.prompts}, but data.{data} has {source.rows} rows; "
            f"lower the one or raise data.{data}.rows"
        )
    if source.builder is not None and source.split == "train":
        learnt = {name for stage in recipe.stages if isinstance(stage, Optimised) for name in stage.data} - {data}
        alike = [n for n in sorted(learnt & recipe.data.keys()) if recipe.data[n].builder == source.builder]
        if same := [name for name in alike if recipe.data[name].split == "train"]:
            yield (
                f"evaluation.data = {data!r} is built from what {same[0]!r}, which is trained on, is built from; set "
                f'data.{data}.split = "heldout"'
            )
    path = source.path and Path(source.path).resolve()
    twins = {name for name, other in recipe.data.items() if path and other.path and Path(other.path).resolve() == path}
    drawn = _drawn(recipe)
    held_out = {data, *twins, *(name for name in drawn if drawn[name] == drawn[data])}
    asked = {stage.name for stage in recipe.stages if isinstance(stage, Synthesize) and held_out & stage.data.keys()}
    for stage in recipe.stages:
        learnt_from = {*stage.data, *stage.calibrating} if isinstance(stage, Optimised) else set()
        for name in sorted((held_out | asked) & learnt_from):
            made = f", which asks {data!r}" if name in asked else ""
            yield (
                f"stage {stage.name!r} trains on {name!r}{made}, the held-out questions of [evaluation]; "
                "use another source"
            )


def _judges(recipe: Recipe) -> Iterator[str]:
    names = {stage.name for stage in recipe.stages}
    used = {name for stage in recipe.stages for name in stage.judges}
    for name, table in recipe.judges.items():
        where = f"judges.{name}"
        if name in names:
            yield f"{where}: a stage has this name too, and `judge = {name!r}` could mean either; rename one"
        if name in used and table.key_env is not None and not os.environ.get(table.key_env):
            yield (
                f"{where}.key_env = {table.key_env!r}: the environment has no such variable; set it to the key of "
                f"{table.endpoint}, for a submitted job where its Ray head starts"
            )
        try:
            template = template_of(table.template)
        except TemplateError as error:
            yield f"{where}.template: {error}"
            continue
        if table.endpoint is not None and not template.fenced:
            asks = ", ".join(name for name, one in BUILT_IN.items() if one.fenced)
            yield (
                f"{where}.template = {table.template!r} is what a judge of this system's was trained on, and tells no "
                f"other how to answer; take one of {asks}, or a text file"
            )
        known = ", ".join(f'"{field}"' for field in template.fields)
        if template.grammar not in (None, table.grammar):
            fields = f" and fields = [{known}], or some of them" if known else ""
            told = f'is answered in grammar = "{template.grammar}"'
            yield f"{where}.template = {table.template!r} {told}: give it{fields}"
        elif known and (other := set(table.fields) - set(template.fields)):
            yield f"{where}.fields: template {table.template!r} asks for {known}, and not for {min(other)!r}; remove it"


def _drawn(recipe: Recipe) -> dict[str, str]:
    """For each source the one whose rows it has."""
    return {name: source.like or name for name, source in recipe.data.items()}


def _table(source: Source) -> tuple[str | None, ...]:
    return source.builder, source.table, source.split


def _stage(recipe: Recipe, stage: Stage) -> Iterator[str]:
    earlier = recipe.before(stage)
    yield from _links(recipe, stage, earlier)
    yield from _data(recipe, stage, earlier)
    if stage.evaluate == "none" and stage.kind == "evaluate":
        yield 'it measures nothing; set evaluate = "modes"'
    if isinstance(stage, Sft | Pairs):
        yield from _batch(recipe, stage)
    if isinstance(stage, Sft) and stage.upcycle is not None and stage.lora is not None:
        yield "upcycle makes experts that a LoRA adapter would leave frozen copies of one another; use one of the two"
    if isinstance(stage, Rebuild):
        for slot, part in stage.parts.items():
            yield from _part(slot, part)
    if isinstance(stage, Rl):
        yield from _rl(recipe, stage)
    if isinstance(stage, Synthesize):
        yield from _synthesize(stage)
    yield from _lengths(recipe, stage)
    for gate in stage.gates:
        yield from _gate(recipe, stage, gate.metric)


def _part(slot: str, part: Part) -> Iterator[str]:
    if part.path is not None:
        yield from _folder_or_hub(f"parts.{slot}.path", part.path)


def _links(recipe: Recipe, stage: Stage, earlier: list[Stage]) -> Iterator[str]:
    kinds = {other.name: other.kind for other in recipe.stages}
    made = [other.name for other in earlier if makes_model(other)]
    taken = stage.parts.items() if isinstance(stage, Rebuild) else ()
    named = [(f"parts.{slot}.artifact", part.artifact) for slot, part in taken]
    named += [("of", name) for name in stage.of] if isinstance(stage, Merge) else []
    for judge in stage.judges:
        table = recipe.judges.get(judge)
        named.append(("judge", judge) if table is None else (f"judges.{judge}.artifact", table.artifact))
    learned = [other.name for other in earlier if isinstance(other, RewardModel)]
    for scalar in stage.scalars:
        if scalar not in learned:
            yield f"scalar = {scalar!r} is no earlier reward_model stage; {nearest(scalar, learned)}"
    # what measures or trains a reward model further may start from one
    begun = stage.start in learned and (isinstance(stage, RewardModel) or stage.evaluate == "pairs")
    for role, name in (("start", None if begun else stage.start), *named):
        if name is None or name in made:
            continue
        if name in learned:
            yield (
                f"{role} = {name!r} is a reward_model stage, whose artifact scores replies and gives none; name a "
                "stage that trains a policy"
            )
        elif name not in kinds:
            what, known = (
                ("stage and no [judges] table", [*made, *recipe.judges]) if role == "judge" else ("stage", made)
            )
            yield f"{role} = {name!r} is no {what}; {nearest(name, known)}"
        elif kinds[name] not in ("sft", "preference", "reward_model", "rl", "rebuild", "merge"):
            yield f"{role} = {name!r} is a {kinds[name]} stage, which makes no model; name a stage that trains"
        elif any(name == other.name and not makes_model(other) for other in earlier):
            yield f"{role} = {name!r} only samples (learn = false), and leaves no model; name another"
        elif name == stage.name:
            yield f"{role} = {name!r} is the stage itself; name an earlier one"
        else:
            yield f"{role} = {name!r} comes later; move it before this stage"


def _data(recipe: Recipe, stage: Stage, earlier: list[Stage]) -> Iterator[str]:
    synthesized = [other.name for other in earlier if other.kind == "synthesize"]
    later = [o.name for o in recipe.stages if o.kind == "synthesize" and o.name not in synthesized]
    known = [*recipe.data, *synthesized]
    wanted = [("data", name) for name in stage.data] if isinstance(stage, Draws) else []
    wanted += [("on", stage.on)] if isinstance(stage, Merge) else []
    if stage.eval_data is not None:
        wanted.append(("eval_data", stage.eval_data))
    if isinstance(stage, Optimised):
        wanted += [("upcycle.calibrate", name) for name in stage.calibrating]
    if isinstance(stage, Draws) and not stage.data:
        yield "data is empty; name at least one source with its weight"
    for key, name in wanted:
        if name in known:
            continue
        if name == stage.name:
            yield f"{key} {name!r} is what this stage makes; it cannot be its own input"
        elif name in later:
            yield f"{key} {name!r} is made by a later stage; move stage {name!r} before this one"
        else:
            yield f"{key} {name!r} is no [data] source and no earlier synthesize stage; {nearest(name, known)}"
    drawn = _drawn(recipe)
    if isinstance(stage, Optimised) and drawn.get(str(stage.eval_data)) in {
        drawn.get(name, name) for name in stage.data
    }:
        yield f"it trains on {stage.eval_data!r}, which it is measured on; use another source for one of the two"
    if stage.evaluate == "loss" and not isinstance(stage, Evaluate) and not trains(stage):
        yield 'evaluate = "loss" needs the trainer, which this stage does not use; move it to an evaluate stage'
    yield from _measure(recipe, stage)
    if stage.evaluate in ("judge", "loss", "rank", "pairs") and stage.eval_data is None:
        yield f'evaluate = "{stage.evaluate}" needs eval_data: the source to measure on'


def _measure(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """A reward model is measured on pairs, and nothing else is."""
    scores = isinstance(stage, RewardModel) or any(
        isinstance(other, RewardModel) and other.name == stage.start for other in recipe.stages
    )
    if scores and stage.evaluate not in ("pairs", "none"):
        yield (
            f'evaluate = "{stage.evaluate}" asks a policy, and this is a reward model, which says no words; set '
            'evaluate = "pairs" and eval_data'
        )
    if not scores and stage.evaluate == "pairs":
        yield (
            'evaluate = "pairs" measures a reward model; use it in a reward_model stage, or in an evaluate stage that '
            "starts from one"
        )


def _batch(recipe: Recipe, stage: Sft | Pairs) -> Iterator[str]:
    if isinstance(stage, Sft) and stage.mix == "loss" and stage.batch_size % len(stage.data):
        yield (
            f"batch_size = {stage.batch_size} cannot hold as many rows of each of {len(stage.data)} sources, as mix = "
            '"loss" wants; make it a multiple'
        )
    yield from over_ranks(stage, recipe.resources.trainer_ranks)


def over_ranks(stage: Stage | Pairs, ranks: int) -> Iterator[str]:
    """Problems of dividing a stage's batches over so many trainer ranks."""
    if isinstance(stage, Sft | Pairs) and stage.batch_size * (2 if isinstance(stage, Pairs) else 1) < ranks:
        yield f"batch_size = {stage.batch_size} gives some of {ranks} trainer ranks no row; use at least {ranks}"
    if isinstance(stage, Rl) and not stage.prompts_per_step % stage.updates_per_step:
        prompts, updates = stage.prompts_per_step, stage.updates_per_step
        if prompts // updates * stage.group_size % ranks:
            yield (
                f"prompts_per_step × group_size = {prompts * stage.group_size} rollouts do not divide into "
                f"updates_per_step = {updates} times trainer_ranks = {ranks}; change prompts_per_step to a multiple of "
                f"{_multiple(stage, ranks)}"
            )


def _synthesize(stage: Synthesize) -> Iterator[str]:
    if stage.method in ("difficulty", "pairs") and stage.judge:
        yield f'method = "{stage.method}" asks no judge; leave `judge` out, or use method = "rejection"'
    if stage.method == "critique" and stage.critic is None:
        yield 'method = "critique" needs a critic: a reward function whose note is what the judge should say'
    if stage.method != "critique" and stage.critic is not None:
        yield f'method = "{stage.method}" asks no critic; leave `critic` out, or use method = "critique"'
    yield from _function("answer", stage.answer)
    if stage.critic is not None:
        yield from _function("critic", stage.critic)
    most = stage.most_rows
    if stage.min_rows > most:
        yield f"min_rows = {stage.min_rows}, but {stage.prompts} prompts give at most {most} rows; lower it or ask more"


def _rl(recipe: Recipe, stage: Rl) -> Iterator[str]:
    prompts, updates = stage.prompts_per_step, stage.updates_per_step
    if prompts % updates:
        yield (
            f"prompts_per_step = {prompts} does not divide into updates_per_step = {updates}, each of whole groups; "
            f"change prompts_per_step to a multiple of {updates}"
        )
    yield from over_ranks(stage, recipe.resources.trainer_ranks)
    estimator = estimator_of(stage)
    if stage.group_size == 1 and estimator is not None and estimator.within_groups:
        named = "advantage" if stage.advantage is not None else "algorithm"
        other = '"generalised" or "batch_normalised"' if stage.advantage is not None else '"ppo" or "reinforce++"'
        yield (
            f'{named} = "{getattr(stage, named)}" compares the rollouts of a group, and group_size = 1 leaves nothing '
            f"to compare; raise it, or take {other}"
        )
    if stage.max_staleness or stage.replay is not None:
        objective = method_of(stage, "dapo" if stage.algorithm == "auto" else stage.algorithm).objective
        if objective == "reinforce" and stage.compare == "sampler":
            yield (
                f"{f'max_staleness = {stage.max_staleness}' if stage.replay is None else 'replay'} lets tokens come "
                'from other weights, which the objective "reinforce" does not correct; use another, or compare = '
                '"trainer"'
            )
    if stage.record is not None:
        for twin in _recording(recipe, stage.record):
            if twin is not stage:
                yield f"record = {stage.record!r} is that of stage {twin.name!r} too; each needs a folder of its own"
    if stage.replay is not None:
        made = next((o.steps for o in _recording(recipe, stage.replay) if o in recipe.before(stage)), None)
        steps = len(list(Path(stage.replay).glob("step-*.json"))) if made is None else made
        if steps < stage.steps:
            yield (
                f"replay = {stage.replay!r} holds {steps} of the stage's {stage.steps} steps; name the folder that a "
                "stage's `record` named, and lower `steps` to what it holds"
            )
    if not stage.rewards:
        yield "rewards is empty: nothing to learn from; add [stages.rewards.NAME] with a function, judge or scalar"
    for name, part in stage.rewards.items():
        first = stage.rewards.get(part.only_if) if part.only_if is not None else None
        if part.only_if is not None and (first is None or first.only_if or first.product):
            free = [other for other, reward in stage.rewards.items() if not (reward.only_if or reward.product)]
            advice = nearest(part.only_if, free)
            yield f"rewards.{name}.only_if = {part.only_if!r} is no part that is asked first; {advice}"
        if first is not None and (first.scalar or first.clip):
            yield f"rewards.{name}.only_if = {part.only_if!r} asks whether it gave 1, as no scalar and no clip does"
        for factor in part.product or ():
            if factor not in stage.rewards or stage.rewards[factor].product is not None:
                free = [other for other, reward in stage.rewards.items() if reward.product is None]
                yield f"rewards.{name}.product names {factor!r}, no function or judge here; {nearest(factor, free)}"
        if part.function is not None:
            yield from _function(f"rewards.{name}.function", part.function)


def _recording(recipe: Recipe, folder: str) -> list[Rl]:
    """The stages that record into this folder."""
    return [
        stage
        for stage in recipe.stages
        if isinstance(stage, Rl) and stage.record is not None and Path(stage.record).resolve() == Path(folder).resolve()
    ]


def _multiple(stage: Rl, ranks: int) -> int:
    """The least number of prompts a step that gives every rank as many rollouts of every update."""
    return stage.updates_per_step * ranks // math.gcd(ranks, stage.group_size)


def _function(key: str, spec: str) -> Iterator[str]:
    home, colon, name = spec.rpartition(":")
    file = file_of(spec) if home or not colon else None
    if (not colon and file is None) or (colon and not (home and name.isidentifier())):
        yield (
            f'{key} = {spec!r} is not written "module:function" or "path/file.py:function", and no installed package '
            "offers a reward under that name"
        )
        return
    if not colon:
        return
    if file is None:
        yield f"{key} = {spec!r}: no module {home!r} here; correct the name, or install what holds it"
    elif not file.is_file():
        yield f"{key} = {spec!r}: no such file {file}; correct the path"
    elif file.suffix == ".py":
        # read and not run: running it may take long, or do what a plan must not
        text = file.read_text(errors="replace")
        try:
            ast.parse(text)
        except SyntaxError as error:
            yield f"{key} = {spec!r}: {file}:{error.lineno} is not Python ({error.msg}); correct that line"
            return
        if "import *" not in text and not re.search(rf"\b{name}\b", text):
            there = re.findall(r"def (\w+)", text)
            yield f"{key} = {spec!r}: {file} has no {name!r}; {nearest(name, there)}"


def _lengths(recipe: Recipe, stage: Stage) -> Iterator[str]:
    limit = recipe.resources.max_model_len
    for key, tokens in recipe.longest_replies(stage).items():
        if tokens >= limit:
            yield (
                f"{key} = {tokens} leaves no room for a prompt in resources.max_model_len = {limit}; "
                "lower the one or raise the other"
            )


# what a stage measures under each prefix, where that is a closed list; categories and corruptions are the data's
MODES = ("accuracy", "accuracy.low", "accuracy.high", "greedy", "format_rate", "think_rate", "tokens", "truncated")
GAINS = ("gain", "gain.low", "gain.high")
METRICS = {
    "eval.think.": (*MODES, *GAINS, "soundness", "right_but_unsound"),
    "eval.direct.": (*MODES, *GAINS),
    "eval.extra.": ("accuracy",),
    "reward_model.": (
        *("accuracy", "accuracy.low", "accuracy.high", "margin", "loss", "confidence", "calibration"),
        *("chosen", "rejected", "rows"),
    ),
    "judge.": ("precision", "recall", "kappa", "accuracy", "failed", "rows", "score_error"),
    "synthesis.": ("prompts", "accuracy", "none_right", "all_right", "kept", "unjudged"),
    "model.": ("parameters", "trainable"),
    "eval.loss": ("",),
    "eval.exact": ("",),
    "eval.rank.": ("accuracy", "chance", "rows"),
    "rebuild.": ("kept", "resized", "taken", "fresh", "left"),
    "merge.": ("loss", "barrier"),
}
OPEN = re.compile(
    r"eval\.(think|direct)\.((accuracy|think_rate|tokens)\..+|pass@\d+)|eval\.exact\..+|"
    r"judge\.(specificity|calibration)\..+|reward_model\.accuracy\..+|merge\.loss\..+"
)
AT_TEMPERATURE = re.compile(r"eval\.think\.accuracy(?:\.best|@([\d.]+))")


def _gate(recipe: Recipe, stage: Stage, metric: str) -> Iterator[str]:
    """Refuse a metric this stage cannot produce, before hours are spent finding out."""
    learns, samples = makes_model(stage), stage.kind == "rl" and getattr(stage, "replay", None) is None
    asks = {mode: stage.evaluate == "modes" and mode in recipe.evaluation.modes for mode in ("think", "direct")}
    makers = {
        "eval.think.": (asks["think"], 'set evaluate = "modes", and name "think" in evaluation.modes'),
        "eval.direct.": (asks["direct"], 'set evaluate = "modes", and name "direct" in evaluation.modes'),
        "eval.extra.": (
            stage.evaluate == "modes" and stage.eval_data is not None,
            'set evaluate = "modes" and eval_data',
        ),
        "eval.loss": (stage.evaluate == "loss", 'set evaluate = "loss" and eval_data'),
        "eval.exact": (stage.evaluate == "loss", 'set evaluate = "loss" and eval_data'),
        "eval.rank.": (stage.evaluate == "rank", 'set evaluate = "rank" and eval_data'),
        "reward_model.": (stage.evaluate == "pairs", 'set evaluate = "pairs" and eval_data'),
        "judge.": (stage.evaluate == "judge", 'set evaluate = "judge" and eval_data'),
        "synthesis.": (stage.kind == "synthesize", "move it to a synthesize stage"),
        "rebuild.": (stage.kind == "rebuild", "move it to a rebuild stage"),
        "merge.": (stage.kind == "merge", "move it to a merge stage"),
        "train.": (isinstance(stage, Sft | Pairs), "move it to a stage that learns from rows"),
        "rl.": (stage.kind == "rl", "move it to an rl stage"),
        "logprob_gap.": (stage.kind == "rl" and learns, "move it to an rl stage that learns"),
        "sync": (learns and samples, "move it to an rl stage that samples and learns"),
        "model.": (learns or trains(stage), "move it to a stage that learns"),
    }
    prefix = next((known for known in makers if metric.startswith(known)), None)
    if prefix is None:
        yield f"gate on {metric!r}, which no stage measures; names begin with {', '.join(makers)}"
        return
    possible, advice = makers[prefix]
    if not possible:
        yield f"gate on {metric!r}, which this stage does not measure; {advice}"
    elif metric.endswith(("soundness", "right_but_unsound")) and recipe.evaluation.soundness is None:
        yield f"gate on {metric!r}, but evaluation.soundness names no function; give one"
    elif (asked := re.search(r"\.pass@(\d+)$", metric)) and int(asked[1]) != recipe.evaluation.samples:
        yield f"gate on {metric!r}, but evaluation.samples = {recipe.evaluation.samples}; only that k is measured"
    elif at := AT_TEMPERATURE.fullmatch(metric):
        if not isinstance(stage, Evaluate):
            yield f"gate on {metric!r}, which only an evaluate stage measures; move it there, with `temperatures`"
        elif not stage.temperatures:
            yield f"gate on {metric!r}, but no `temperatures` are given; name them"
        elif at[1] is not None and at[1] not in {f"{value:g}" for value in stage.temperatures}:
            yield f"gate on {metric!r}, but temperatures = {stage.temperatures}; name that one there too"
    elif prefix in METRICS and metric.removeprefix(prefix) not in METRICS[prefix] and not OPEN.fullmatch(metric):
        yield f"gate on {metric!r}, which no stage measures; {nearest(metric, [prefix + m for m in METRICS[prefix]])}"


def _budget(recipe: Recipe) -> Iterator[str]:
    spent = sum(stage.budget_minutes or 0.0 for stage in recipe.stages)
    if recipe.budget_minutes is not None and spent > recipe.budget_minutes:
        yield (
            f"the stages' budgets add up to {spent:g} minutes, more than budget_minutes = {recipe.budget_minutes:g}; "
            "lower one or raise the total"
        )
