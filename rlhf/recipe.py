"""The recipe: a complete, typed, frozen description of one curriculum, read from TOML.

    recipe = load(["think_fusion.toml", "toy_size.toml"], ["stages.long-cot.lr = 1e-4"])

Files compose left to right, then overrides. Tables merge key by key; `stages` merge by stage name, so an override
file may change one field of one stage. What is one thing is replaced whole: a stage's `data`, `train` and `drop`, and
a source that turns from a builder to a path. An override may still change one key of it (`stages.NAME.data.text = 1`),
and `{ remove = true }` removes a stage, a source or a reward. An unknown key is an error that names the nearest known
one. Every default lives here and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]  # "~" is the user's home
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Implementation = Literal["auto", "vllm", "transformers"]  # of vLLM: its own, or its Transformers backend


Layer = tuple[str, dict[str, Any], int]  # a file or an override: its name, what it holds, the keys it spells out


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key, what is wrong and what to do."""


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Upcycle(Table):
    """Turn a trained dense decoder into a mixture of experts, identical at the start."""

    num_experts: PositiveInt
    top_k: PositiveInt


class Lora(Table):
    """Low-rank adapters through peft; the artifact is in peft's format."""

    rank: PositiveInt = 8
    alpha: Positive = 16.0
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Tokenizer(Table):
    """A byte-level BPE tokenizer trained on the text of the recipe's own data."""

    vocab_size: Annotated[int, Field(ge=264)] = 512  # 256 bytes and the marks (rlhf.data.tokenizer)


class Model(Table):
    """The policy to start from: either a `bridge` to build, or the `path` of a bridge folder or of any Hugging Face
    vision-language model (folder or hub name)."""

    path: UserPath | None = None
    bridge: dict[str, dict[str, Any]] | None = None
    tokenizer: Tokenizer = Tokenizer()
    implementation: Implementation = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.bridge is None):
            raise ValueError("give either `path` (a model to start from) or `bridge` (one to build), not both or none")
        return self


class Chat(Table):
    """How thinking is asked for: this suffix on the user's text (SAIL-VL2 §5)."""

    think_suffix: str = (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
        "The reasoning process MUST BE enclosed within <think> </think> tags. "
        "The final answer MUST BE put in \\boxed{}."
    )


class Source(Table):
    """Rows of data: a file or folder (`path`: parquet, JSONL, a Hugging Face dataset folder), or a `builder`."""

    path: UserPath | None = None
    builder: str | None = None
    table: str | None = None
    split: Literal["train", "heldout"] = "train"
    rows: PositiveInt = 1000
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        if (self.path is None) == (self.builder is None):
            raise ValueError("give either `path` (rows on disk) or `builder` with `table`, not both or none")
        if self.builder is not None and self.table is None:
            raise ValueError("a `builder` needs `table`: which of its tables to make")
        return self


class Resources(Table):
    """What the job may use, and what each actor holds. Threads are per process."""

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    trainer_ranks: PositiveInt = 1
    trainer_threads: PositiveInt = 2
    trainer_threads_beside: PositiveInt = 1  # while engines sample beside it: RL with several updates a step
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: bool = False
    rollout_workers: PositiveInt = 1
    rollout_threads: PositiveInt = 1  # vLLM's own work is one thread of Python; cores serve the trainer better
    tensor_parallel: PositiveInt = 1
    max_num_seqs: PositiveInt = 256
    max_model_len: PositiveInt = 256
    kv_cache_gib: Positive = 0.25
    reward_workers: PositiveInt = 1
    memory_gib: Positive = 8.0
    token_budget: PositiveInt = 8192
    transport: Literal["auto", "cpu", "ipc", "nccl"] = "auto"


class Deadlines(Table):
    """Seconds after which a wait is given up and named."""

    start: Positive = 300.0
    step: Positive = 300.0
    generate: Positive = 300.0
    sync: Positive = 60.0
    reward: Positive = 30.0
    save: Positive = 120.0


class Evaluation(Table):
    """The held-out questions asked after every stage, in both modes: avg@samples at `temperature`, greedy beside it."""

    data: Name | None = None
    prompts: PositiveInt = 512
    samples: PositiveInt = 4
    temperature: Positive = 1.0
    max_tokens: PositiveInt = 96
    answer: str = "rewards.answer:boxed"
    soundness: str | None = None
    bootstrap: PositiveInt = 2000


class Judging(Table):
    """How a judge is asked, and when its yes counts: a yes with a token of less than `confidence` on its way, of the
    probabilities the judge gave what it said, is a no. 0 counts every yes."""

    max_tokens: PositiveInt = 80
    confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class Tracking(Table):
    """Where progress goes besides the console and JSONL."""

    tensorboard: bool = True
    wandb: bool = True
    project: str = "thinkfusion"
    rollout_samples: PositiveInt = 12


class Gate(Table):
    """A bound on a metric of the stage; a failed gate stops the job with a nonzero status."""

    metric: str
    min: Finite | None = None
    max: Finite | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError(f"gate on {self.metric!r} bounds nothing: give `min` or `max`")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"gate on {self.metric!r}: min = {self.min:g} is above max = {self.max:g}; exchange them")
        return self


class Reward(Table):
    """One part of a reward: a function ("module:function" or "path/file.py:function"), or a judge: the artifact of
    an earlier stage served by a rollout worker of its own. With `only_if` a judge is asked only about rollouts to which
    that other part gave 1; the rest get 0 from it, since a chain that ends in a wrong answer is not sound."""

    function: str | None = None
    judge: Name | None = None
    weight: Positive = 1.0
    only_if: Name | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Reward:
        if (self.function is None) == (self.judge is None):
            raise ValueError("give either `function` or `judge`, not both or none")
        if self.only_if is not None and self.judge is None:
            raise ValueError("`only_if` saves asking a judge; a function is asked about every rollout")
        return self


class StageBase(Table):
    """What every stage has. `start` names the stage whose artifact it continues (default: the latest that made a
    model, or `[model]`). `evaluate`: the questions of [evaluation] in both modes, a judge's precision and recall on
    `eval_data`, only the held-out loss on `eval_data`, or nothing. With "modes", `eval_data` adds questions asked
    directly (eval.extra.accuracy)."""

    name: Name
    start: Name | None = None
    gates: list[Gate] = []
    budget_minutes: Positive | None = None
    evaluate: Literal["modes", "judge", "loss", "none"] = "none"
    eval_data: Name | None = None


class Optimised(StageBase):
    """A stage that trains. `train` maps globs over parameter names to learning rates, the rest is frozen; without
    it every parameter trains at `lr`."""

    data: dict[Name, Positive]
    steps: PositiveInt
    lr: Positive = 1e-6
    train: dict[str, Positive] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    clip_grad: Positive = 1.0
    router_aux: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    lora: Lora | None = None
    checkpoint_every: PositiveInt = 20


class Sft(Optimised):
    """Supervised: negative log-likelihood of the assistant's words. normalise = "token": mean over all answer
    tokens of the batch; "row": summed over each row's tokens, divided by the number of rows (SAIL-VL2, think-fusion).
    `reset` names parameters to start anew (a fresh connector); `upcycle` makes the decoder a mixture of experts."""

    kind: Literal["sft"]
    batch_size: PositiveInt
    normalise: Literal["token", "row"] = "token"
    reset: list[str] = []
    upcycle: Upcycle | None = None


class Rl(Optimised):
    """Reinforcement learning on groups of rollouts. Clip ranges belong to the algorithm unless given. Each of a step's
    updates learns from prompts of its own, while the next one's are sampled."""

    kind: Literal["rl"]
    algorithm: Literal["auto", "grpo", "dapo", "gspo"] = "auto"
    clip_low: Positive | None = None
    clip_high: Positive | None = None
    prompts_per_step: PositiveInt
    group_size: Annotated[int, Field(ge=2)] = 8
    updates_per_step: PositiveInt = 1
    temperature: Positive = 1.0
    max_tokens: PositiveInt = 96
    refill_rounds: Annotated[int, Field(ge=0)] = 2
    max_failed_rewards: Fraction = 0.05
    rewards: dict[Name, Reward]

    @property
    def pipelined(self) -> bool:
        """Whether the trainer learns while engines sample."""
        return self.updates_per_step > 1


class Synthesize(StageBase):
    """Make data with a model. method "difficulty": ask `samples` times, keep prompts by how many answers were right
    (`drop` maps a category to the counts that go: "none_right", "all_right"; "*" for any other).
    method "rejection": keep rollouts whose answer is right and, with `judge`, whose chain is judged sound.
    method "critique": every rollout becomes a row for a judge to learn from or to be measured on. `critic`, a reward
    function, says whether it is sound, and in its Score's note what the judge should reply, ending in yes or no."""

    kind: Literal["synthesize"]
    method: Literal["difficulty", "rejection", "critique"]
    data: dict[Name, Positive]
    prompts: PositiveInt
    samples: PositiveInt = 4
    temperature: Positive = 1.0
    max_tokens: PositiveInt = 96
    answer: str = "rewards.answer:boxed"
    category: str = "category"
    drop: dict[str, list[Literal["none_right", "all_right"]]] = {"*": ["none_right", "all_right"]}
    judge: Name | None = None
    critic: str | None = None
    per_prompt: PositiveInt = 1
    min_rows: PositiveInt = 1


class Evaluate(StageBase):
    """Measure a model without changing it."""

    kind: Literal["evaluate"]
    temperatures: list[Positive] = [1.0]


Stage = Annotated[Sft | Rl | Synthesize | Evaluate, Field(discriminator="kind")]


class Recipe(Table):
    """A curriculum: the model, its data, the stages in order, and what they may use."""

    name: Name
    description: str = ""
    seed: int = 0
    budget_minutes: Positive | None = None
    model: Model
    chat: Chat = Chat()
    data: dict[Name, Source] = {}
    resources: Resources = Resources()
    deadlines: Deadlines = Deadlines()
    evaluation: Evaluation = Evaluation()
    judging: Judging = Judging()
    tracking: Tracking = Tracking()
    stages: Annotated[list[Stage], Field(min_length=1)]


def load(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Read and compose recipe files, then apply overrides written as TOML (`stages.NAME.key = value`).

    Raises RecipeError naming file and key.
    """
    if not paths:
        raise RecipeError("no recipe given; try recipes/think_fusion_digits.toml")
    layers: list[Layer] = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
        layers.append((str(path), _parse(text, str(path)), 0))
    for override in overrides:
        origin = f"override {override!r}"
        layers.append((origin, _parse(override, origin), _keys_written(override)))
    merged: dict[str, Any] = {}
    for origin, table, written in layers:
        merged = _merge(merged, table, origin, written)
    return validate(merged, " + ".join(map(str, paths)), layers)


def validate(table: dict[str, Any], origin: str, layers: Sequence[Layer] = ()) -> Recipe:
    """Check a composed table against the schema. Raises RecipeError with every problem, one a line, each under the
    last of its `layers` that wrote the key, or under `origin`."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(table, origin, layers, error))) from error


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin}: not valid TOML: {error}") from error


def _keys_written(override: str) -> int:
    """How many keys the left side of `a.b.c = value` has."""
    for equals in (place for place, sign in enumerate(override) if sign == "="):
        try:
            inner: Any = tomllib.loads(override[:equals] + "= 0")
        except tomllib.TOMLDecodeError:
            continue  # an equals sign inside a quoted key
        depth = 0
        while isinstance(inner, dict) and len(inner) == 1:
            inner, depth = next(iter(inner.values())), depth + 1
        return depth
    return 0


def _merge(
    base: dict[str, Any], over: dict[str, Any], origin: str, written: int = 0, path: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`base` changed by `over`. `written`: so many keys of a path the writer spelled out, and what they lead through
    is changed and not replaced."""
    merged = dict(base)
    for key, value in over.items():
        old, here = merged.get(key), (*path, key)
        if here == ("stages",):
            merged[key] = _merge_stages(old, value, origin, written)
        elif value == {"remove": True} and here[-1] != "options":  # a builder's options are its own
            if key not in merged:
                raise RecipeError(f"{origin}: there is no {'.'.join(here)} to remove")
            del merged[key]
        elif isinstance(old, dict) and isinstance(value, dict) and not _is_replaced(here, old, value, written):
            merged[key] = _merge(old, value, origin, written, here)
        else:
            merged[key] = value
    return merged


def _is_replaced(path: tuple[str, ...], old: dict[str, Any], new: dict[str, Any], written: int) -> bool:
    """Whether a table is one thing: a mix of data, a choice of what trains or is dropped, unless a key of it is spelled
    out; a source that turns from a builder to a path or back."""
    if path[0] == "stages":
        return len(path) == 3 and path[2] in ("data", "train", "drop") and written <= len(path)
    kinds = {"path", "builder"}
    return path[0] == "data" and len(path) == 2 and bool(kinds & new.keys()) and not kinds & new.keys() & old.keys()


def _merge_stages(base: list[dict[str, Any]] | None, over: Any, origin: str, written: int) -> list[dict[str, Any]]:
    """`[[stages]]` appends or changes by name; `stages.NAME.key = …` changes one, or appends one that has a `kind`."""
    changes = over
    if isinstance(over, dict):
        changes = [fields | {"name": name} if isinstance(fields, dict) else fields for name, fields in over.items()]
    if not isinstance(changes, list) or not all(
        isinstance(change, dict) and isinstance(change.get("name"), str) for change in changes
    ):
        raise RecipeError(f"{origin}: stages are written [[stages]] with a `name` each, or [stages.NAME]")
    if base is None and isinstance(over, list):
        return changes  # with two of one name, if it has them: the plan refuses that
    merged = {stage["name"]: stage for stage in base or []}
    for change in changes:
        name = change["name"]
        if name in merged and change.get("remove") is True:
            del merged[name]
        elif name in merged:
            merged[name] = _merge(merged[name], change, origin, written, ("stages", name))
        elif change.get("remove") is True or (isinstance(over, dict) and "kind" not in change):
            known = f"the stages are {', '.join(map(str, merged))}" if merged else "lay this over a recipe that has it"
            raise RecipeError(f"{origin}: no stage named {name!r}; {known}")
        else:
            merged[name] = change
    return list(merged.values())


def _explain(table: dict[str, Any], origin: str, layers: Sequence[Layer], error: ValidationError) -> Iterator[str]:
    kinds = {"sft", "rl", "synthesize", "evaluate"}
    for problem in error.errors():
        # pydantic puts the discriminator's tag into the path; a reader of the recipe never wrote it
        path = _named(table, [part for part in problem["loc"] if part not in kinds])
        key = ".".join(map(str, path))
        place = next((name for name, written, _ in reversed(layers) if _has(written, path)), origin)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), _known_keys(problem["loc"]), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{place}: unknown key {key!r}{hint}"
        elif problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
            yield f"{place}: {key}: needs kind = {', '.join(map(repr, sorted(kinds)))}"
        elif problem["type"] == "missing":
            advice = "; a part of a recipe is laid over a whole one: name that one first" if key == "model" else ""
            yield f"{place}: {key} is missing{advice}"
        elif problem["type"] in ("model_type", "dict_type"):
            yield f"{place}: {key} must be a table of keys and values"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{place}: {key}: {message}"


def _named(table: dict[str, Any], path: Sequence[int | str]) -> list[int | str]:
    """The path with a stage's name in place of its number."""
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int):
        return ["stages", table["stages"][path[1]].get("name", path[1]), *path[2:]]
    return list(path)


def _has(table: Any, path: Sequence[int | str]) -> bool:
    """Whether a file or override wrote something at this path."""
    for place, part in enumerate(path):
        if place == 1 and path[0] == "stages" and isinstance(table, list):
            table = {stage.get("name"): stage for stage in table}
        if isinstance(table, list) and isinstance(part, int):
            table = table[part] if part < len(table) else None
        elif isinstance(table, dict) and part in table:
            table = table[part]
        else:
            return False
    return True


def _known_keys(loc: Sequence[int | str]) -> list[str]:
    models: dict[str, type[Table]] = {"sft": Sft, "rl": Rl, "synthesize": Synthesize, "evaluate": Evaluate}
    current: type[Table] | None = Recipe
    for part in loc[:-1]:
        if isinstance(part, str) and part in models:
            current = models[part]
            continue
        if current is None or isinstance(part, int):
            continue
        found = current.model_fields.get(str(part))
        current = _table_of(found.annotation) if found else current
    return list(current.model_fields) if current else []


def _table_of(annotation: Any) -> type[Table] | None:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _table_of(argument)) is not None:
            return found
    return None
