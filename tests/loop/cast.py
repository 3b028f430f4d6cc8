"""A cast without processes: the same roles as `actors.launch`, in memory, deterministic, in milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.base import evaluate, items_of, resolve
from rlhf.roles import ActorLostError
from rlhf.types import Batch, Fit, Group, Probe, Prompt, Rollout, Sampling, Score, StepStats, TrainSpec


class KilledError(Exception):
    """What a test raises in the place of a SIGKILL."""


class FakeEngine:
    """Answers right with probability `skill`; in think mode with a (sound or empty) chain. Judges say what is true."""

    def __init__(self, tokenizer: Any, skill: float = 0.5) -> None:
        self.tokenizer = tokenizer
        self.skill = skill
        self.version = 0
        self.asked: list[str] = []
        self.asleep = False

    async def sleep(self) -> None:
        self.asleep = True

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return [self._group(prompt, sampling) for prompt in prompts]

    async def likelihoods(self, probes: Sequence[Probe]) -> list[tuple[float, ...]]:
        """Shorter answers are likelier."""
        return [(-0.5,) * (len(probe.token_ids) - 1) for probe in probes]

    async def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> AsyncGenerator[tuple[int, Group]]:
        """Every prompt a call of its own, in whatever order they end."""

        async def one(place: int) -> tuple[int, Group]:
            (group,) = await self.generate([prompts[place]], sampling)
            return place, group

        asked = [asyncio.create_task(one(place)) for place in range(len(prompts))]
        try:
            for found in asyncio.as_completed(asked):
                yield await found
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _group(self, prompt: Prompt, sampling: Sampling) -> Group:
        self.asked.append(prompt.key)
        self.asleep = False
        rollouts = []
        for index in range(sampling.num):
            draw = random.Random(f"{sampling.seed}/{prompt.key}/{index}")
            text = self._text(prompt, draw)
            ids = (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id)
            count = len(ids)
            rollouts.append(Rollout(ids, (-0.5,) * count, (self.version,) * count, text, "stop"))
        return Group(prompt, prompt.token_ids, tuple(rollouts))

    def _text(self, prompt: Prompt, draw: random.Random) -> str:
        if "sound?" in prompt.question:
            return draw.choice(["yes", "no"])
        right = draw.random() < self.skill
        answer = prompt.columns["answer"] if right else "none"
        chain = "<think>i see it.</think>" if prompt.think else ""
        return f"{chain}\\boxed{{{answer}}}"


class FakeTrainer:
    """Counts steps; its checkpoint is that count, its artifact the folder it began from. Its loss falls fastest at
    `best` times the recipe's learning rate, by 1 a step there."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.begun: list[TrainSpec] = []
        self.batches: list[Batch] = []
        self.steps = 0
        self.progress = 0.0
        self.best = 1.0
        self.breaks_at: float | None = None
        self.die_at: int | None = None
        self.lost_at: int | None = None
        self.merged_loss = 0.5  # of a model that was averaged

    async def begin(self, spec: TrainSpec, probes: Sequence[Probe]) -> Mapping[str, float]:
        self.begun.append(spec)
        self.steps, self.progress = 0, 0.0
        return {"parameters": 1.0}

    async def step(self, batch: Batch, fresh: bool = False, alone: bool = True) -> StepStats:
        if self.die_at is not None and len(self.batches) >= self.die_at:
            raise KilledError
        if self.lost_at is not None and len(self.batches) >= self.lost_at:
            self.lost_at = None
            raise ActorLostError("a trainer rank died during 'step'")
        if self.breaks_at is not None and batch.scale >= self.breaks_at:
            raise FloatingPointError("the loss is not finite")
        self.batches.append(batch)
        self.steps += 1
        self.progress += min(batch.scale / self.best, self.best / batch.scale)
        gap = [1e-6] * batch.num_tokens if fresh else []
        return StepStats({"loss": -self.progress, "clip_fraction": 0.1}, gap, [False] * len(gap))

    async def losses(self, batch: Batch) -> Mapping[str, Fit]:
        loss = self.merged_loss if self.begun[-1].model.endswith("merged") else 0.5
        rows = [sample for part in batch.micro_batches[0] for sample in part]
        return {s.key: Fit(loss * s.num_learned, s.num_learned, exact=place % 2 == 0) for place, s in enumerate(rows)}

    async def divergences(self, batch: Batch, estimator: str) -> Mapping[str, float]:
        """As many nats as a sample has completion tokens."""
        return {sample.key: float(sample.num_completion) for part in batch.micro_batches[0] for sample in part}

    async def logprobs(self, batch: Batch) -> Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """A policy that finds every token of a chosen reply likelier than its reference does."""
        rows = [sample for part in batch.micro_batches[0] for sample in part]
        before = {s.key: -1.1 if s.key.endswith("chosen") else -1.0 for s in rows}
        return {s.key: ((-1.0,) * s.num_completion, (before[s.key],) * s.num_completion) for s in rows}

    async def values(self, batch: Batch, alone: bool = True) -> Mapping[str, tuple[float, ...]]:
        """Half a point before every token."""
        return {s.key: (0.5,) * s.num_completion for part in batch.micro_batches[0] for s in part}

    async def rewards(self, batch: Batch) -> Mapping[str, float]:
        """Prefers every chosen reply, by 2."""
        rows = [sample for part in batch.micro_batches[0] for sample in part]
        return {s.key: 1.0 if s.key.endswith("chosen") else -1.0 for s in rows}

    async def publish(self, engine: Any, version: int) -> float:
        engine.version = version
        return 0.01

    async def prove(self, engine: Any, version: int) -> Mapping[str, float]:
        return {"sync_probe.max": 1e-6}

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "steps.json").write_text(json.dumps([self.steps, self.progress]))

    async def restore(self, folder: Path) -> None:
        self.steps, self.progress = json.loads((folder / "steps.json").read_text())

    async def export(self, folder: Path) -> None:
        shutil.copytree(self.begun[-1].model, folder, dirs_exist_ok=True)
        (folder / "trained.json").write_text(
            json.dumps([self.begun[-1].seed, dict(self.begun[-1].train), self.steps, self.progress])
        )


class FakeRewards:
    """The real reward functions, called in this process, and reward models that like short replies."""

    def __init__(self) -> None:
        self.scoring: dict[str, Path] = {}
        self.asked: list[tuple[str, Path]] = []

    async def scalar(self, model: str, groups: Sequence[Group]) -> list[list[Score]]:
        self.asked.append((model, self.scoring[model]))
        return [[Score("scored", -float(len(one.token_ids))) for one in group.rollouts] for group in groups]

    async def score(
        self, function: str, groups: Sequence[Group], options: Mapping[str, Any] | None = None
    ) -> list[list[Score]]:
        reward = resolve(function, options)
        return [evaluate(reward, items_of(group)) for group in groups]


class FakeCast:
    """rlhf.roles.Actors without processes."""

    cold_starts = 0

    def __init__(self, tokenizer: Any, skill: float = 0.5) -> None:
        self.engine = FakeEngine(tokenizer, skill)
        self.trainer = FakeTrainer(self.engine)
        self.rewards = FakeRewards()
        self.served: list[dict[str, Path]] = []
        self.renewals = 0

    @contextlib.asynccontextmanager
    async def scoring(self, models: Mapping[str, Path]) -> AsyncIterator[None]:
        self.rewards.scoring = dict(models)
        yield
        self.rewards.scoring = {}

    async def renew_trainer(self) -> None:
        self.renewals += 1

    @contextlib.asynccontextmanager
    async def serving(self, models: Mapping[str, Path]) -> AsyncIterator[Mapping[str, FakeEngine]]:
        self.served.append(dict(models))
        yield dict.fromkeys(models, self.engine)
