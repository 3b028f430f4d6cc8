"""What the loops ask of the processes they drive. `actors` plays these roles for real, the tests with fakes.

Every method may be awaited concurrently and ends by its own deadline: a role never waits for ever.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.types import Batch, Fit, Group, Probe, Prompt, Sampling, Score, StepStats, TrainSpec


@dataclass(frozen=True)
class SyncReport:
    """One publish: seconds of the transfer, seconds of its proof, and what the proof measured (sync_probe.*)."""

    seconds: float
    proof_seconds: float
    metrics: Mapping[str, float]


class SyncError(RuntimeError):
    """The engine does not compute what the trainer computes; the message names the parameter group."""


class ActorLostError(RuntimeError):
    """A process, or the engine in it, is gone; a new one can continue where it stood."""


class Engine(Protocol):
    """One model served by one or more rollout workers."""

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample `sampling.num` rollouts of every prompt, in the order of the prompts."""
        ...

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[tuple[int, Group]]:
        """The same, (place among the prompts, group) as each group is finished."""
        ...

    async def likelihoods(self, probes: Sequence[Probe]) -> list[tuple[float, ...]]:
        """Log-probs of each sequence's tokens from its second on, pictures expanded; temperature 1, unmasked."""
        ...

    async def sleep(self) -> None:
        """Until it is asked again, leave the memory of a GPU it shares to the trainer; elsewhere it does nothing."""
        ...


class Trainer(Protocol):
    """The policy's optimiser, over all its ranks. Every method raises ActorLostError when one of them died."""

    async def begin(self, spec: TrainSpec, probes: Sequence[Probe]) -> Mapping[str, float]:
        """Load the model and make it ready to train; returns its facts (parameters, trainable: counts). Every
        publish and export is proven on `probes`."""
        ...

    async def step(self, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        """One optimizer step. `fresh`: the weights are those that sampled the batch's current rows, so what trainer and
        engine give the same tokens can be compared. Not `alone`: engines are sampling, and want their cores."""
        ...

    async def losses(self, batch: Batch) -> Mapping[str, Fit]:
        """How well the policy fits the learned tokens of each sample, by sample key; no gradient."""
        ...

    async def divergences(self, batch: Batch, estimator: str) -> Mapping[str, float]:
        """Summed divergence of each sample's tokens from the reference, as sampled, in nats, by sample key."""
        ...

    async def logprobs(self, batch: Batch) -> Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """Of each sample's completion tokens, under the policy and under its reference, by sample key."""
        ...

    async def values(self, batch: Batch, alone: bool = True) -> Mapping[str, tuple[float, ...]]:
        """What the critic says before each completion token of a sample, by sample key."""
        ...

    async def rewards(self, batch: Batch) -> Mapping[str, float]:
        """What the reward model that trains says of each sample's reply, by sample key; no gradient."""
        ...

    async def publish(self, engine: Any, version: int) -> float:
        """Send the weights to an engine of the same cast, which then samples from them as `version`; returns the
        seconds it took."""
        ...

    async def prove(self, engine: Any, version: int) -> Mapping[str, float]:
        """Prove that what was published arrived, before the next step and while the engine may sample; returns what was
        measured (sync_probe.*). Raises SyncError."""
        ...

    async def save(self, folder: Path) -> None: ...

    async def restore(self, folder: Path) -> None: ...

    async def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder (peft's format with LoRA), with the scores of its probes."""
        ...


class Rewards(Protocol):
    """Reward functions and reward models in processes of their own."""

    async def score(
        self, function: str, groups: Sequence[Group], options: Mapping[str, Any] | None = None
    ) -> list[list[Score]]:
        """One Score a rollout, for each group, of the function with these options (`rewards.base.resolve`). A crash or
        a missed deadline costs its own sample only."""
        ...

    async def scalar(self, model: str, groups: Sequence[Group]) -> list[list[Score]]:
        """One Score a rollout, for each group, of a reward model that is `scoring`; the same whatever groups are asked
        about beside it."""
        ...


class Actors(Protocol):
    """Everything that is running for a job."""

    @property
    def trainer(self) -> Trainer: ...

    @property
    def rewards(self) -> Rewards: ...

    def serving(self, models: Mapping[str, Path]) -> AbstractAsyncContextManager[Mapping[str, Engine]]:
        """Engines for these models (role → artifact folder) while the context lasts; an engine of the same
        architecture is reused with new weights, proven against the artifact's probe scores."""
        ...

    def scoring(self, models: Mapping[str, Path]) -> AbstractAsyncContextManager[None]:
        """Reward models for these artifacts (name → folder) while the context lasts, for `rewards.scalar` to ask."""
        ...

    async def renew_trainer(self) -> None:
        """Replace the trainer's processes by new ones, in which no stage has begun."""
        ...

    @property
    def cold_starts(self) -> int: ...
