"""The tables of a recipe beside its stages and rewards: model, data, resources, how it is measured and followed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from rlhf.recipe.table import Implementation, Name, Positive, Table, UserPath

# of rows, by the names a recipe may use
BUILDERS = {"digits": "rlhf.data.digits:build", "deciding": "rlhf.data.deciding:build"}


class Tokenizer(Table):
    """A byte-level BPE tokenizer trained on the text of the recipe's own data, or that of a published language model
    (`path`: a folder or hub name), which is taught the marks that it lacks and keeps its chat template. `marks`: more
    of them, such as "<judge>", each of which becomes one token."""

    marks: list[str] = []
    vocab_size: Annotated[int, Field(ge=264)] = 512  # 256 bytes and the marks (rlhf.data.tokenizer)
    path: UserPath | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Tokenizer:
        if self.path is not None and "vocab_size" in self.model_fields_set:
            raise ValueError("`vocab_size` is of a tokenizer to train, and `path` names one: remove one of the two")
        return self


class Model(Table):
    """The policy to start from: either a `bridge` to build, or the `path` of a bridge folder or of any Hugging Face
    vision-language model (folder or hub name). `sizes`: by slot and type, values for keys
    that a bridge's table of that slot has, if it is of that type, so that one file makes any bridge small."""

    path: UserPath | None = None
    bridge: dict[str, dict[str, Any]] | None = None
    tokenizer: Tokenizer = Tokenizer()
    implementation: Implementation = "auto"

    @model_validator(mode="before")
    @classmethod
    def _resized(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "sizes" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "sizes"}
        bridge, sizes = given.get("bridge"), given["sizes"]
        if not isinstance(bridge, dict) or not isinstance(sizes, dict):
            raise ValueError("`sizes` are [model.sizes.SLOT.TYPE] tables, laid over a `bridge`: give both, or none")  # noqa: TRY004
        bridge = dict(bridge)
        for slot, by_type in sizes.items():
            table = bridge.get(slot)
            smaller = by_type.get(table.get("type"), {}) if isinstance(by_type, dict) and table is not None else {}
            if not isinstance(by_type, dict) or not isinstance(smaller, dict):
                raise ValueError(f"sizes.{slot} holds no tables: write [model.sizes.{slot}.TYPE] with keys and values")  # noqa: TRY004
            if table is not None:
                bridge[slot] = {**table, **{key: value for key, value in smaller.items() if key in table}}
        return rest | {"bridge": bridge}

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.bridge is None):
            raise ValueError("give either `path` (a model to start from) or `bridge` (one to build), not both or none")
        given = self.tokenizer.path
        if given is not None and (self.bridge is None or "vocab_size" not in self.bridge.get("decoder", {})):
            raise ValueError(
                f"tokenizer.path = {given!r} goes with a `bridge` to build whose decoder.vocab_size is that of the "
                "language model; give it"
            )
        return self


class Chat(Table):
    """How thinking is asked for: this suffix on the user's text (SAIL-VL2 §5); and what of a conversation is learned:
    its "last" reply, or "all" of them (LLaVA; MIMIC-IT's examples before a question)."""

    supervise: Literal["last", "all"] = "last"

    think_suffix: str = (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
        "The reasoning process MUST BE enclosed within <think> </think> tags. "
        "The final answer MUST BE put in \\boxed{}."
    )


class Source(Table):
    """Rows of data: a file or folder (`path`: parquet, JSONL, a Hugging Face dataset folder), or a `builder`. `format`
    makes conversations of other columns (rlhf.data.formatters): { type = "caption" }. `select` chooses among the rows,
    one selector after the other (rlhf.data.selectors): { type = "cap", rows = 50000 }. Two sources of one table have
    different rows, but for those drawn like (`like`) the same: { like = "all", select = [...] } chooses among its."""

    path: UserPath | None = None
    builder: str | None = None
    table: str | None = None
    split: Literal["train", "heldout"] = "train"
    rows: PositiveInt = 1000
    like: Name | None = None
    options: dict[str, Any] = {}
    format: dict[str, Any] | None = None
    select: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        if (self.path is None) == (self.builder is None):
            raise ValueError("give either `path` (rows on disk) or `builder` with `table`, not both or none")
        if self.like is not None and self.builder is None:
            raise ValueError("`like` says which rows a `builder` draws; those of a `path` are what they are: remove it")
        if self.builder is not None and self.table is None:
            raise ValueError("a `builder` needs `table`: which of its tables to make")
        return self


class Resources(Table):
    """What the job may use, and what each actor holds. Threads are per process."""

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    trainer_ranks: PositiveInt = 1
    trainer_threads: PositiveInt = 2
    trainer_threads_beside: PositiveInt = 1  # while engines sample beside it
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: bool = False
    rollout_workers: PositiveInt = 1
    rollout_threads: PositiveInt = 1  # vLLM's own work is one thread of Python; cores serve the trainer better
    tensor_parallel: PositiveInt = 1
    max_num_seqs: PositiveInt = 256
    max_model_len: PositiveInt = 256
    kv_cache_gib: Positive = 0.25
    reward_workers: PositiveInt = 1
    reward_memory_gib: Positive = 2.0  # what a reward may allocate before it is refused more
    memory_gib: Positive = 8.0
    token_budget: PositiveInt = 8192  # of a micro-batch
    checkpointing: bool = False  # backward computes each layer anew instead of keeping what forward made of it
    packing: bool = True  # rows end to end without padding, a group's prompt once; bridges only
    # of weights to engines; auto: ipc where trainer and engines share GPUs, nccl where they have their own; on CPUs shm
    # on one node, else cpu, which is Ray's object store
    transport: Literal["auto", "shm", "cpu", "ipc", "nccl"] = "auto"


class Deadlines(Table):
    """Seconds after which a wait is given up and named."""

    queue: Positive = 86400.0  # for room on a cluster that others use
    start: Positive = 300.0
    step: Positive = 300.0
    generate: Positive = 300.0
    sync: Positive = 60.0
    reward: Positive = 30.0
    save: Positive = 120.0


class Evaluation(Table):
    """The held-out questions asked after every stage, in both modes or one: avg@samples at `temperature`, greedy beside
    it. Accuracy, thinking rate and tokens are also given apart for each value of the column `by`. `answer`, `format`
    and `soundness` are reward functions."""

    data: Name | None = None
    prompts: PositiveInt = 512
    samples: PositiveInt = 4
    temperature: Positive = 1.0
    max_tokens: PositiveInt = 96
    modes: Annotated[list[Literal["think", "direct"]], Field(min_length=1)] = ["think", "direct"]
    by: str = "category"
    answer: str = "rewards.answer:boxed"
    format: str = "rewards.format:think"
    soundness: str | None = None
    bootstrap: PositiveInt = 2000


class Tracking(Table):
    """Where progress goes besides the console and JSONL."""

    tensorboard: bool = True
    wandb: bool = True
    project: str = "thinkfusion"
    rollout_samples: PositiveInt = 12
