"""The data that travels between the driver and the actors.

A worked example of one step, with 2 prompts of 3 rollouts each:

    Prompt  "what is the sum?" + 1 image        2 of them
    Group   the prompt and its 3 rollouts       2 of them, each rollout with a Score
    Sample  prompt ids + completion ids         6 of them, each with an advantage
    Batch   the samples of one optimizer step, cut by trainer rank and micro-batch

Every class is frozen; bulk data (media) is kept as encoded bytes until pixels are needed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from PIL import Image

MediaKind = Literal["image", "video"]
Outcome = Literal["scored", "failed", "timed_out"]
Finish = Literal["stop", "length", "abort"]
Pool = Literal["last", "mean", "likelihood"]  # of a reply's tokens, in a reward model
Normalise = Literal["token", "row", "row_mean", "constant"]


@dataclass(frozen=True)
class Media:
    """One image (or, later, video) of a row, as encoded bytes (PNG, JPEG, …).

    size is (width, height) in pixels; times are the seconds of a video's frames, empty for an image; question the token
    ids of what is asked beside it, for bridges whose connector reads.
    """

    data: bytes
    size: tuple[int, int]
    kind: MediaKind = "image"
    times: tuple[float, ...] = ()
    question: tuple[int, ...] = ()

    @staticmethod
    def of(fields: Mapping[str, Any], data: bytes) -> Media:
        """From what `asdict` gives, its data apart; files that are older than `question` have none."""
        asked = tuple(fields.get("question", ()))
        return Media(data, tuple(fields["size"]), fields["kind"], tuple(fields["times"]), asked)

    def open(self) -> Image.Image:
        """Decode to an RGB image, with the question in its `info`."""
        image = Image.open(io.BytesIO(self.data)).convert("RGB")
        image.info["question"] = self.question
        return image

    def digest(self, reads: bool) -> str:
        """Equal for equal bytes; for a bridge that `reads` the question, if that is equal too."""
        asked = ",".join(map(str, self.question)) if reads else ""
        return hashlib.sha256(f"{self.kind}\0{asked}\0".encode() + self.data).hexdigest()


@dataclass(frozen=True)
class Prompt:
    """One question, rendered for the model.

    key        unique and stable over runs: "<source>/<row>[#think]"
    question   the user's words, without template or thinking suffix
    token_ids  the rendered chat template, un-expanded: one placeholder per media item
    think      whether the thinking suffix was added
    columns    every other column of the row (answer, category, digits, …)
    """

    key: str
    source: str
    question: str
    token_ids: tuple[int, ...]
    media: tuple[Media, ...] = ()
    think: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How to sample: `num` rollouts a prompt. temperature 0 is greedy. seed makes every request replayable; None: the
    engine draws as it comes, which costs it nothing a reply. regex: what every whole reply matches, where the engine
    can enforce that; it refuses what it cannot."""

    num: int = 1
    temperature: float = 1.0
    max_tokens: int = 96
    seed: int | None = 0
    regex: str | None = None


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt, as sampled by the engine.

    token_ids  [T] the sampled ids, end-of-text included where it was sampled
    logprobs   [T] log-probabilities after temperature and token mask
    versions   [T] the policy version that sampled each token
    num_stale  so many of the first tokens are of versions too old to learn from
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    text: str
    finish: Finish
    num_stale: int = 0


@dataclass(frozen=True)
class Score:
    """What a reward said of one rollout. Only outcome "scored" has a value; a failure is never a 0."""

    outcome: Outcome
    value: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Group:
    """A prompt with its rollouts. prompt_ids are the ids the engine saw: placeholders expanded."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One row to train on: prompt (expanded) and completion.

    token_ids      [P + T]
    prompt_length  P; the loss covers the T tokens after it
    weight         multiplies the row's loss; 0 keeps it out
    advantage      of every completion token (RL); 1 for supervised rows
    logprobs       [T] of the policy that sampled the row; empty for supervised rows
    current        whether the weights that its step starts from sampled every token
    advantages     [T] of each completion token, where a critic tells them apart; empty: `advantage`
    returns        [T] what a critic should have said before each; empty without one
    skipped        [start, end) of tokens after the prompt that are read, not learned: what a user says between replies
    signal         what the answer's signal tokens are to say, in words; "" where it has none
    margin         of a pair's replies: by how much a reward model should prefer the chosen one
    """

    key: str
    token_ids: tuple[int, ...]
    prompt_length: int
    media: tuple[Media, ...] = ()
    weight: float = 1.0
    advantage: float = 1.0
    logprobs: tuple[float, ...] = ()
    current: bool = True
    advantages: tuple[float, ...] = ()
    returns: tuple[float, ...] = ()
    skipped: tuple[tuple[int, int], ...] = ()
    signal: str = ""
    margin: float = 0.0

    @property
    def num_completion(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - self.prompt_length

    @property
    def num_learned(self) -> int:
        """Those of them that the loss covers."""
        return self.num_completion - sum(end - start for start, end in self.skipped)


@dataclass(frozen=True)
class Batch:
    """One optimizer step: micro_batches[rank][i] is a tuple of samples.

    Every rank has the same number of micro-batches (an empty tuple where it has no rows left).
    num_tokens and num_rows count completion tokens and rows over all ranks: the loss's denominators. index: its place
    among the stage's optimizer steps, from 0, which decides the learning rate; scale: by what that is multiplied.
    """

    micro_batches: tuple[tuple[tuple[Sample, ...], ...], ...]
    num_tokens: int
    num_rows: int
    index: int = 0
    scale: float = 1.0

    @cached_property
    def num_read(self) -> int:
        """Tokens of all rows that weigh something, prompts among them."""
        return sum(len(s.token_ids) for rank in self.micro_batches for part in rank for s in part if s.weight > 0)


@dataclass(frozen=True)
class StepStats:
    """Metrics of one Batch, reduced over ranks; gap holds the |trainer − engine| log-prob differences [N] of its
    sampled tokens, where they were asked for. tied [N]: there, or earlier in the row, a router of the trainer was at a
    tie, where the engine may choose other experts (a top-k flip)."""

    metrics: Mapping[str, float]
    gap: Sequence[float] = ()
    tied: Sequence[bool] = ()

    def __post_init__(self) -> None:
        if len(self.gap) != len(self.tied):
            raise ValueError(f"{len(self.gap)} gaps and {len(self.tied)} ties: one of each for every sampled token")


@dataclass(frozen=True)
class Fit:
    """How well a policy fits a sample's learned tokens, `tokens` of them: their negative log-likelihood `nll`, summed,
    in nats; `exact`: greedy decoding would give them, each being the likeliest after those before it."""

    nll: float
    tokens: int
    exact: bool


@dataclass(frozen=True)
class Probe:
    """A fixed sequence on which trainer and engine must agree. token_ids un-expanded; media as in Prompt."""

    token_ids: tuple[int, ...]
    media: tuple[Media, ...] = ()


@dataclass(frozen=True)
class ProbeScores:
    """logprobs[i][t]: log-prob of token t+1 of probe i given what precedes it, on the expanded sequence.

    Trainer side only: margins[i][t] is the smallest top-k router margin over layers and over positions ≤ t (inf for
    a dense decoder); experts_reached maps a layer's name to the experts the probes visit, experts_total counts them.
    """

    expanded_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    margins: tuple[tuple[float, ...], ...] = ()
    experts_reached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts_total: int = 0


@dataclass(frozen=True)
class Publication:
    """One version of the policy's weights on its way to the engines.

    buckets are handles, of shared memory, Ray's object store, GPU memory or what is sent (`actors.weights`); names maps
    every parameter to its shape: the coverage an engine checks.
    """

    version: int
    buckets: tuple[Any, ...]
    names: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Correction:
    """What is done where the probabilities of trainer and engine differ: weights capped at `truncate`, tokens dropped
    whose ratio is outside `mask` (low, high), rows whose mean ratio is outside `rows`; None: nothing."""

    truncate: float | None = None
    mask: tuple[float, float] | None = None
    rows: tuple[float, float] | None = None


@dataclass(frozen=True)
class Loss:
    """What a trainer minimises.

    kind "nll": negative log-likelihood of the completion; any other kind names an objective of `rlhf.algorithms`.
    normalise says what a token weighs (`rlhf.algorithms.losses.policy_loss`); longest: the tokens a completion may
    have, for "constant".
    compare "sampler": the importance ratio is the policy's probability over the engine's; "trainer": over the trainer's
    own before this optimizer step, and the correction weighs what is between that and the engine's.
    clip_low and clip_high bound the importance ratio to [1 − low, 1 + high], dual_clip where the advantage is
    negative; unused by "nll". entropy: the weight of a bonus for the policy's entropy. kl: (estimator, weight) of the
    divergence from the reference, the model the stage starts from.
    temperature divides the logits, and masked_ids get −inf, on the trainer as on the engine.
    """

    kind: str = "nll"
    normalise: Normalise = "token"
    longest: int = 1
    compare: Literal["sampler", "trainer"] = "sampler"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    correction: Correction = Correction()
    entropy: float = 0.0
    kl: tuple[str, float] | None = None
    temperature: float = 1.0
    masked_ids: tuple[int, ...] = ()
    router_aux: float = 0.0
    router_count: Literal["chosen", "first"] = "chosen"
    router_layers: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True)
class Scalar:
    """How a reward model is asked of a reply: a head of one output at the "last" token, or the "mean" of what that says
    at each; or, without a head, `beta` times the "likelihood", the sum of the tokens' log-probabilities in nats."""

    pool: Pool = "last"
    beta: float = 1.0

    @property
    def headed(self) -> bool:
        return self.pool != "likelihood"


@dataclass(frozen=True)
class TrainSpec:
    """One stage's training, as a trainer rank needs it.

    model    folder of the artifact to continue from
    train    globs over parameter names (without the leading "model.") to learning rates; the rest is frozen
    steps    optimizer steps of the whole stage, for the schedule; warmup is a fraction of them
    reset    globs of parameters to initialise anew; upcycle (num_experts, top_k, layers), its
             routers calibrated on the rows of `calibration`; lora (rank, alpha, target modules),
             and `whole`, globs of what trains as it is beside those adapters
    rows_of  tokens; only their rows of the embeddings and of the head's weight train, all of them if there are none
    muon     hidden matrices learn by Muon: (ratio to their learning rates, momentum); None: all by AdamW
    beside   OpenMP threads of each rank in steps and probes while engines sample; else as many as it was started with
    checkpointing  backward computes each layer anew instead of keeping what forward made of it
    packed   rows of a micro-batch lie end to end, a shared prompt once, without padding; for bridges only
    reference  keep a frozen copy of `model` to measure divergences from; with adapters alone the base is that
    objectives  of a stage that teaches the connector alone, and their weights: `rlhf.bridge.alignment`
    signals  weight of what signal tokens say beside their captions (`actors.signals`); 0: they say nothing
    critic   the learning rate of a second model, begun from `model`, that foretells the rewards; None: there is none
    scalar   of a reward model: how it is asked of a reply
    """

    model: str
    seed: int
    loss: Loss
    train: Mapping[str, float]
    steps: int
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 1.0
    zero_stage: int = 2
    offload: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    reset: tuple[str, ...] = ()
    upcycle: tuple[int, int, str] | None = None
    calibration: tuple[Sample, ...] = ()
    lora: tuple[int, float, tuple[str, ...]] | None = None
    whole: tuple[str, ...] = ()
    rows_of: tuple[str, ...] = ()
    muon: tuple[float, float] | None = None
    beside: int | None = None
    checkpointing: bool = False
    packed: bool = False
    reference: bool = False
    critic: float | None = None
    objectives: Mapping[str, float] = field(default_factory=dict)
    signals: float = 0.0
    scalar: Scalar | None = None
