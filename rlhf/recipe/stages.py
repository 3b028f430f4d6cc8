"""The stages a curriculum is made of, by kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from rlhf.recipe.rewards import Reward
from rlhf.recipe.table import Decay, Finite, Fraction, Name, Positive, Slot, SparseLayers, Table, UserPath


class Upcycle(Table):
    """Turn a trained dense decoder into a mixture of experts, identical at the start, in these `layers` (MoE-LLaVA:
    every second). `calibrate`, a source of rows: its new routers are turned so that the tokens of `rows` of these
    choose experts evenly."""

    num_experts: PositiveInt
    top_k: PositiveInt
    layers: SparseLayers = "all"
    calibrate: Name | None = None
    rows: PositiveInt = 128

    @model_validator(mode="after")
    def _rows_are_used(self) -> Upcycle:
        if self.calibrate is None and "rows" in self.model_fields_set:
            raise ValueError("`rows` does nothing without `calibrate`, the source they are taken of: remove it")
        return self


class Lora(Table):
    """Low-rank adapters on the decoder's layers of these names, through peft; the artifact is in peft's format.
    `whole`: globs over parameters that train as they are beside the adapters, a connector, say; then the artifact is
    the whole model, its adapters folded in."""

    rank: PositiveInt = 8
    alpha: Positive = 16.0
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    whole: list[str] = []


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


class StageBase(Table):
    """What every stage has. `start` names the stage whose artifact it continues (default: the latest that made a
    model, or `[model]`). `evaluate`: the questions of [evaluation] in its modes, a judge's precision and recall on
    `eval_data`, only the held-out "loss" on `eval_data` and what greedy decoding would give, a choice by likelihood
    among the candidates of each row of `eval_data` ("rank"), how often a reward model prefers the chosen reply of each
    row of `eval_data` ("pairs"), or nothing. With "modes", `eval_data` adds questions asked directly
    (eval.extra.accuracy)."""

    name: Name
    start: Name | None = None
    gates: list[Gate] = []
    budget_minutes: Positive | None = None
    evaluate: Literal["modes", "judge", "loss", "rank", "pairs", "none"] = "none"
    eval_data: Name | None = None

    @property
    def judges(self) -> tuple[str, ...]:
        """The judges of this one's rollouts, in order, each once: of [judges], or stages whose models judge."""
        return ()

    @property
    def scalars(self) -> tuple[str, ...]:
        """The stages whose reward models score this one's rollouts, in order, each once."""
        return ()


class Muon(Table):
    """Hidden matrices learn by Muon: by `ratio` times their learning rate in spectral norm a step; 20 to 40 times the
    rate of AdamW, which the other parameters keep."""

    ratio: Positive
    momentum: Decay = 0.95


class Draws(StageBase):
    """A stage that draws rows of `data`, sources with their weights. `mix`: how often each is drawn: by the "weights",
    times its "size" or the root of it ("sqrt_size", InstructBLIP); or, of an sft stage, as many of each in every step,
    the weights multiplying the sources' mean losses ("loss", Flamingo). alike = "modality": the rows of a batch all
    have pictures, or none has (LLaVA-1.5)."""

    data: dict[Name, Positive]
    mix: Literal["weights", "size", "sqrt_size", "loss"] = "weights"
    alike: Literal["modality"] | None = None

    @model_validator(mode="after")
    def _has_losses(self) -> Draws:
        if self.mix == "loss" and not isinstance(self, Sft):
            raise ValueError('mix = "loss" weighs the losses of an sft stage; take "weights" here')
        if self.alike is not None and not isinstance(self, Sft | Pairs):
            raise ValueError("`alike` is for the batches of stages that learn from rows; remove it here")
        if self.alike is not None and self.mix == "loss":
            raise ValueError(
                'mix = "loss" has rows of every source in a step, and `alike` of one kind: take one of them'
            )
        return self


class Optimised(Draws):
    """A stage that trains, by AdamW or Muon. `train` maps globs over parameter names to learning rates, the rest is
    frozen; without it every parameter trains at `lr`. Of embeddings that train, and of the head's weight, only the rows
    of the tokens `rows_of` do if there are any. `router_aux` weighs a loss for unevenly used experts, 1 a layer
    where use is even: counting all experts a token takes (Qwen3-MoE) or its "first" one, the mean over layers or their
    "sum" (MoE-LLaVA: both the latter)."""

    steps: PositiveInt
    lr: Positive = 1e-6
    train: dict[str, Positive] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    muon: Muon | None = None
    clip_grad: Positive = 1.0
    router_aux: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    router_count: Literal["chosen", "first"] = "chosen"
    router_layers: Literal["mean", "sum"] = "mean"
    lora: Lora | None = None
    rows_of: list[str] = []
    checkpoint_every: PositiveInt = 20

    @property
    def calibrating(self) -> dict[str, int]:
        """The source that new routers are calibrated on, if there is one, and how many of its rows."""
        return {}

    @model_validator(mode="after")
    def _one_rate(self) -> Optimised:
        if self.train is not None and "lr" in self.model_fields_set:
            raise ValueError("`lr` does nothing beside `train`, whose globs have their own rates: remove one of them")
        if self.train is not None and not self.train:
            raise ValueError("`train` names no parameters; leave it out to train all of them at `lr`")
        return self

    @model_validator(mode="after")
    def _clipped_or_not(self) -> Optimised:
        if self.muon is not None and "clip_grad" in self.model_fields_set:
            raise ValueError(
                "`clip_grad` does nothing in a stage with `muon`, whose steps have one size whatever the gradient's: "
                "remove one of them"
            )
        return self


class Search(Table):
    """AdaLRS (`rlhf.search`): between the shares `span` of the stage's steps the learning rate is searched for. A
    trial of `window` steps at a rate `up` times as high is kept if the loss falls faster; if it falls slower, it is
    taken back and the rate divided by `down`. `decay` draws both factors closer to 1 with each trial."""

    window: Annotated[int, Field(ge=3)]
    up: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    down: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.99
    span: tuple[Fraction, Fraction] = (0.1, 0.4)


class Sft(Optimised):
    """Supervised: negative log-likelihood of the assistant's words. normalise = "token": mean over all answer
    tokens of the batch; "row": summed over each row's tokens, divided by the number of rows (SAIL-VL2, think-fusion).
    `reset` names parameters to start anew (a fresh connector); `upcycle` makes the decoder a mixture of experts.
    `objectives`, with their weights, in place of the likelihood: BLIP-2's contrast ("itc"), matching ("itm") and
    generation ("itg") of pictures and answers, which teach a Q-Former and need no decoder, and Flamingo's "contrast",
    which teaches an encoder. `signals` weighs, beside the
    likelihood, what the bridge's head makes of signal tokens against a text encoder's view of column `signal`. `search`
    finds the learning rate on the way."""

    kind: Literal["sft"]
    batch_size: PositiveInt
    objectives: dict[Literal["itc", "itm", "itg", "contrast"], Positive] = {}
    signals: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    normalise: Literal["token", "row"] = "token"
    reset: list[str] = []
    upcycle: Upcycle | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _has_room_to_search(self) -> Sft:
        if self.search is not None:
            first, last = (share * self.steps for share in self.search.span)
            if last - first < 2 * self.search.window:
                raise ValueError(
                    f"search compares windows of {self.search.window} steps, and between {self.search.span[0]:g} and "
                    f"{self.search.span[1]:g} of {self.steps} steps there is no room for two: lower `search.window`"
                )
        return self

    @property
    def calibrating(self) -> dict[str, int]:
        probed = self.upcycle.calibrate if self.upcycle is not None else None
        return {} if self.upcycle is None or probed is None else {probed: self.upcycle.rows}


class Pairs(Optimised):
    """A stage that learns from rows with a chosen and a rejected reply: `batch_size` pairs a step."""

    batch_size: PositiveInt


class Preference(Pairs):
    """Direct preference optimisation (DPO). `beta` is how dear it is to leave the model that the stage starts from, the
    reference (with `lora` the base, adapters off); `smoothing` the share of pairs thought to be labelled the wrong way
    round."""

    kind: Literal["preference"]
    beta: Positive = 0.1
    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class RewardModel(Pairs):
    """A reward model (Bradley–Terry) for an rl stage to name as a `scalar`: the model that the stage starts from, with
    one output in place of its language head, learns to say more of a chosen reply than of the rejected one, and more by
    the row's column `margin` where it has one. It is asked at a reply's "last" token, or `pool` takes the "mean" over
    all (arXiv:2306.00398), which tells it where a reply went wrong; or it keeps its language head, and what it says is
    `beta` times the reply's log-"likelihood" (arXiv:2401.08417), which knows what the model knew before. `center`
    weighs the square of what it says of both together, which holds rewards around 0; `anchor` what it says of the
    chosen reply, which keeps a likelihood from falling. A head learns at the rate of the glob of `train` that names it,
    else at the highest. What it leaves is no policy: only rl stages, and stages that measure or train it further, can
    name it."""

    kind: Literal["reward_model"]
    center: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    pool: Literal["last", "mean", "likelihood"] = "last"
    beta: Positive = 1.0
    anchor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _fits_its_head(self) -> RewardModel:
        if self.rows_of and self.pool != "likelihood":
            raise ValueError(
                "`rows_of` says which tokens' rows of embeddings and head train, and the head of a reward model has "
                "one row, for none of them: remove it"
            )
        for key in ("beta", "anchor"):
            if self.pool != "likelihood" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'`{key}` is of a likelihood, not of a head: add pool = "likelihood", or remove it')
        return self


class Correction(Table):
    """What is done where trainer and engine disagree about a token: weights capped at `truncate` (with compare =
    "trainer"; a ratio over the "sampler" spans the disagreement already), tokens dropped whose ratio is outside `mask`
    = [low, high], rows whose mean ratio is outside `rows` = [low, high]."""

    truncate: Positive = 2.0
    mask: tuple[Positive, Positive] | None = None
    rows: tuple[Positive, Positive] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Correction:
        for name in ("mask", "rows"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < 1 < bounds[1]:
                raise ValueError(f"`{name}` = {list(bounds)} must be [low, high] around 1, where both agree")
        return self


class Divergence(Table):
    """KL divergence from the model the stage starts from, at `weight`, in the "loss" or taken off the "reward".
    `estimator` (Schulman): k3 in the loss and k1 in the reward unless given."""

    weight: Positive
    place: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3"] | None = None

    @property
    def chosen(self) -> Literal["k1", "k2", "k3"]:
        return self.estimator or ("k3" if self.place == "loss" else "k1")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Divergence:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("k1 in the loss has a gradient of mean zero and holds nothing back: take k2 or k3")
        return self


class Critic(Table):
    """A second model, begun from the policy's, that learns at rate `lr` what rollouts are worth; whole and by AdamW,
    with the stage's schedule, warm-up, betas, weight decay and clip_grad. `discount` and `smoothing` (GAE's γ and λ)
    carry a reward back to earlier tokens."""

    lr: Positive = 1e-5
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.95


class Rl(Optimised):
    """Reinforcement learning on groups of rollouts. `algorithm` names an advantage, an objective, a normalisation and
    a clip range, each of which may be given apart. Each of a step's updates learns from prompts of its own, while the
    next one's are sampled.

    compare      what the importance ratio divides by: the probabilities of the "sampler", or the "trainer"'s own before
                 the update, the rest being left to `correction`
    dual_clip    a bound on the ratio of tokens with negative advantage (3 is usual)
    critic       of "ppo", and of any algorithm with advantage = "generalised": one advantage a token
    entropy      weight of a bonus for the policy's entropy
    overlong     tokens before max_tokens in which a soft punishment for length grows to −1 (DAPO)
    record       a folder that gets the groups of every step, with their scores
    replay       such a folder, whose groups the stage learns from: no engine starts, nothing is sampled or scored, and
                 what says how (rewards, group_size, prompts_per_step, overlong, in_order, max_staleness) does nothing
    learn        false: only sample, score and record, in order; the policy stays, and the stage leaves no model
    in_order     false: a step's updates take groups as they are finished, so that the trainer learns from quick ones
                 while slow ones are sampled; true: in the order of their prompts, and the same seed gives the same run
    max_staleness  how many versions old the weights that sampled a token may be; above 0 engines sample while the
                 trainer learns, up to so many steps ahead, and nothing is in order"""

    kind: Literal["rl"]
    algorithm: Literal[
        "auto", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "reinforce++_baseline"
    ] = "auto"
    advantage: (
        Literal[
            "group_normalised",
            "group_centred",
            "leave_one_out",
            "batch_normalised",
            "baseline_batch_normalised",
            "generalised",
        ]
        | None
    ) = None
    critic: Critic | None = None
    objective: Literal["reinforce", "ppo", "gspo", "cispo"] | None = None
    normalise: Literal["token", "row", "row_mean", "constant"] | None = None
    clip_low: Positive | None = None
    clip_high: Positive | None = None
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    compare: Literal["sampler", "trainer"] = "sampler"
    correction: Correction = Correction()
    entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    overlong: PositiveInt | None = None
    kl: Divergence | None = None
    prompts_per_step: PositiveInt
    group_size: PositiveInt = 8
    updates_per_step: PositiveInt = 1
    temperature: Positive = 1.0
    max_tokens: PositiveInt = 96
    refill_rounds: Annotated[int, Field(ge=0)] = 2
    in_order: bool = True
    max_staleness: Annotated[int, Field(ge=0)] = 0
    max_failed_rewards: Fraction = 0.05
    record: UserPath | None = None
    replay: UserPath | None = None
    learn: bool = True
    rewards: dict[Name, Reward]

    @property
    def judges(self) -> tuple[str, ...]:
        if self.replay is not None:  # the record has what they said
            return ()
        return tuple(dict.fromkeys(part.judge for part in self.rewards.values() if part.judge))

    @property
    def weights(self) -> dict[str, float]:
        """Of each part in the mean."""
        factors = {factor for part in self.rewards.values() for factor in part.product or ()}
        return {
            name: part.weight if part.weight is not None else 0.0 if name in factors else 1.0
            for name, part in self.rewards.items()
        }

    @property
    def scalars(self) -> tuple[str, ...]:
        if self.replay is not None:
            return ()
        return tuple(dict.fromkeys(part.scalar for part in self.rewards.values() if part.scalar))

    @model_validator(mode="after")
    def _one_half_or_both(self) -> Rl:
        if self.replay is not None and (self.record is not None or not self.learn):
            raise ValueError("`replay` learns from a record that is there: remove `record` and `learn`, or `replay`")
        if not self.learn and self.record is None:
            raise ValueError("`learn = false` only samples: give `record`, the folder that gets the groups")
        if not (self.learn and self.replay is None) and self.kl is not None and self.kl.place == "reward":
            raise ValueError(
                "the divergence `kl` goes into the reward where rollouts are scored beside a trainer: with `replay` or "
                '`learn = false` take place = "loss", or remove it'
            )
        return self

    @property
    def foretelling(self) -> Critic | None:
        """The critic of a stage that has one."""
        needed = self.advantage == "generalised" or (self.advantage is None and self.algorithm == "ppo")
        return (self.critic or Critic()) if needed else None

    @model_validator(mode="after")
    def _critic_is_heard(self) -> Rl:
        if self.critic is not None and self.foretelling is None:
            raise ValueError(
                f'`critic` does nothing with algorithm = "{self.algorithm}" and its advantage: take "ppo", or '
                'advantage = "generalised", or remove it'
            )
        return self

    @property
    def pipelined(self) -> bool:
        """Whether the trainer learns while engines sample."""
        return self.updates_per_step > 1 or self.max_staleness > 0


class Synthesize(Draws):
    """Make data with a model. method "difficulty": ask `samples` times, keep prompts by how many answers were right
    (`drop` maps a category to the counts that go: "none_right", "all_right"; "*" for any other). With think = false
    they are asked directly, and rows that have no column `complexity` get one: "easy" where all were right, else "hard"
    (SAIL-RL's labels, one a prompt).
    method "rejection": keep rollouts whose answer is right and, with `judge`, whose chain is judged sound.
    method "pairs": a right reply of the policy's own beside a wrong one to the same question, the `rejected` one, up to
    `per_prompt` such pairs a question; their `corruption` is "own".
    method "critique": every rollout becomes a row for a judge to learn from or to be measured on. `critic`, a reward
    function, says whether it is sound, and in its Score's note what the judge should reply, ending in yes or no."""

    kind: Literal["synthesize"]
    method: Literal["difficulty", "rejection", "pairs", "critique"]
    prompts: PositiveInt
    samples: PositiveInt = 4
    temperature: Positive = 1.0
    max_tokens: PositiveInt = 96
    answer: str = "rewards.answer:boxed"
    category: str = "category"
    drop: dict[str, list[Literal["none_right", "all_right"]]] = {"*": ["none_right", "all_right"]}
    judge: Name | None = None
    critic: str | None = None
    think: bool = True
    per_prompt: PositiveInt = 1
    min_rows: PositiveInt = 1

    @model_validator(mode="after")
    def _thinks(self) -> Synthesize:
        if not self.think and self.method != "difficulty":
            raise ValueError('`think` = false tells how hard prompts are, and is for method "difficulty": remove it')
        return self

    @property
    def judges(self) -> tuple[str, ...]:
        return (self.judge,) if self.judge else ()

    @property
    def most_rows(self) -> int:
        """How many rows it can make."""
        return self.prompts * (1 if self.method == "difficulty" else min(self.per_prompt, self.samples))


class Evaluate(StageBase):
    """Measure a model without changing it; with "modes" also with thinking at other `temperatures`, and the best."""

    kind: Literal["evaluate"]
    temperatures: list[Positive] = []


class Part(Table):
    """A part of another model: of an earlier stage's `artifact`, or of the folder or hub name `path`; a model of
    transformers is itself the part."""

    artifact: Name | None = None
    path: UserPath | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Part:
        if (self.artifact is None) == (self.path is None):
            raise ValueError(
                "give either `artifact` (an earlier stage) or `path` (a folder or hub name), not both or none"
            )
        return self


class Rebuild(StageBase):
    """Another bridge with the same weights, without training: `bridge` is laid over the model's tables, slot by slot (a
    table of another type replaces), so that one stage can see larger pictures than the last. What is new begins afresh;
    a table of positions is resized. `parts` takes over trained parts of other models. `sizes`: by slot, values for keys
    that `bridge` has, so that one file makes any recipe small."""

    kind: Literal["rebuild"]
    bridge: dict[str, dict[str, Any]] = {}
    parts: dict[Slot, Part] = {}

    @model_validator(mode="before")
    @classmethod
    def _resized(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "sizes" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "sizes"}
        bridge, sizes = given.get("bridge", {}), given["sizes"]
        if not isinstance(sizes, dict) or not all(isinstance(table, dict) for table in sizes.values()):
            raise ValueError("`sizes` are tables of keys and values by slot: sizes.tiler = { size = 48 }")
        if not isinstance(bridge, dict):
            return rest
        smaller = {
            slot: {key: sizes.get(slot, {}).get(key, value) for key, value in table.items()}
            if isinstance(table, dict)
            else table
            for slot, table in bridge.items()
        }
        return rest | {"bridge": smaller}

    @model_validator(mode="after")
    def _does_something(self) -> Rebuild:
        if not self.bridge and not self.parts:
            raise ValueError("it changes nothing: give `bridge`, tables to lay over the model's, or `parts`")
        return self


class Merge(StageBase):
    """A model soup: the average of the models of other stages, `of`, by these weights. It is refused where on the rows
    of the source `on` it loses more than `max_barrier` nats a token beyond the average of what they lose: runs that
    learned other things lie in other valleys, and their average in none (SAIL-VL2: 76.6 of like runs, 12.9 of unlike
    ones)."""

    kind: Literal["merge"]
    of: dict[Name, Positive]
    on: Name
    max_barrier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05

    @model_validator(mode="after")
    def _measured(self) -> Merge:
        if len(self.of) < 2:
            raise ValueError("`of` names fewer than two stages, of which there is no average; name those to merge")
        if self.start is not None:
            raise ValueError("`start` does nothing beside `of`: remove it")
        return self


def makes_model(stage: StageBase) -> bool:
    """Whether the stage leaves a policy that others may continue."""
    if isinstance(stage, RewardModel) or (isinstance(stage, Rl) and not stage.learn):
        return False
    return isinstance(stage, Optimised | Rebuild | Merge)


def trains(stage: StageBase) -> bool:
    """Whether the trainer trains something in it: a policy, or a reward model."""
    return isinstance(stage, Optimised) and (makes_model(stage) or isinstance(stage, RewardModel))


Stage = Annotated[
    Sft | Preference | RewardModel | Rl | Rebuild | Merge | Synthesize | Evaluate, Field(discriminator="kind")
]
