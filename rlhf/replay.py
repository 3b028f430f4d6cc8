"""One half of reinforcement learning without the other: groups kept on disk, and learned from again.

RECORD/step-000003.json    what the step after version 3 saw of groups, with their scores, and which it learned from
RECORD/media/SHA256        the bytes of their pictures
RECORD/record.json         what a stage that replays them must share
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from rlhf.checkpoint import read_json, write_json, write_text
from rlhf.data.stream import Draw
from rlhf.evaluation import record
from rlhf.models import masked_ids
from rlhf.recipe import Rl
from rlhf.roles import Engine, SyncReport, Trainer
from rlhf.rollouts import AsFinished, InOrder, Part, Rollouts
from rlhf.scoring import Judge
from rlhf.stage import Context
from rlhf.types import Group, Media, Prompt, Rollout, Score

POSITION = "position.json"  # of a stage that only gathers: what it has gathered so far
SETTINGS = "record.json"


def groups_of(
    stage: Rl, context: Context, engine: Engine | None, judges: Mapping[str, Judge], stream: Draw
) -> Rollouts | Recorded:
    """The stage's source of groups."""
    live = InOrder if stage.in_order and not stage.max_staleness else AsFinished
    kind = live if stage.replay is None else Replayed
    groups = kind(stage, context, engine, judges, stream)
    return groups if stage.record is None else Recorded(groups, Path(stage.record))


class Recorded:
    """The groups of a stage, and a copy of each step's in a folder, which a new stage empties."""

    def __init__(self, groups: Rollouts, folder: Path) -> None:
        self._groups, self._folder = groups, folder

    async def __aenter__(self) -> Self:
        await self._groups.__aenter__()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._groups.__aexit__(kind, error, trace)

    async def take(self, version: int) -> AsyncGenerator[Part]:
        if version == 0:
            for path in self._folder.glob("step-*.json"):
                path.unlink()
            write_json(self._folder / SETTINGS, settings(self._groups.stage, self._groups.context))
        async with aclosing(self._groups.take(version)) as found:
            async for part in found:
                yield part
        await asyncio.to_thread(write_step, self._folder, version, self._groups.parts)

    async def renew(self, trainer: Trainer, version: int) -> None:
        await self._groups.renew(trainer, version)

    async def proven(self) -> SyncReport:
        return await self._groups.proven()

    async def rest(self) -> None:
        await self._groups.rest()

    @property
    def metrics(self) -> dict[str, float]:
        return self._groups.metrics

    @property
    def examples(self) -> list[Group]:
        return self._groups.examples

    def state(self) -> dict[str, Any]:
        return self._groups.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._groups.restore(state)


class Replayed(Rollouts):
    """The groups of a record, in their order: nothing is sampled, scored or published."""

    async def __aenter__(self) -> Self:
        assert self.stage.replay is not None
        _require_same(Path(self.stage.replay), settings(self.stage, self.context))
        return await super().__aenter__()

    async def take(self, version: int) -> AsyncGenerator[Part]:
        assert self.stage.replay is not None
        self.parts = await asyncio.to_thread(read_step, Path(self.stage.replay), version)
        self._require_rewards(self.parts)
        for part in self.parts:
            if part.kept:
                yield part
        self._measure(self.parts)

    async def renew(self, trainer: Trainer, version: int) -> None:  # noqa: ARG002 - there is no engine
        self.serving = version

    async def proven(self) -> SyncReport:
        return SyncReport(0.0, 0.0, {})


async def gather(stage: Rl, context: Context, engine: Engine | None, judges: Mapping[str, Judge]) -> dict[str, float]:
    """Only sample, score and record `stage.steps` steps of the policy as it is; returns the means of their metrics."""
    assert stage.record is not None
    stream, position = context.stream(stage), context.folder / POSITION
    saved = read_json(position) or {"step": 0, "stream": stream.state(), "sums": {}}
    stream.restore(saved["stream"])
    sums: dict[str, float] = saved["sums"]
    judge = next((name for name, part in stage.rewards.items() if part.judge is not None), None)
    async with Recorded(InOrder(stage, context, engine, judges, stream), Path(stage.record)) as groups:
        for step in range(int(saved["step"]), stage.steps):
            async with aclosing(groups.take(step)) as parts:
                async for _ in parts:
                    pass
            for name, value in groups.metrics.items():
                sums[name] = sums.get(name, 0.0) + value
            context.log.log(step + 1, groups.metrics, {})
            context.log.rollouts(step + 1, [record(group, 0, {}, 0, judge) for group in groups.examples])
            write_json(position, {"step": step + 1, "stream": stream.state(), "sums": sums})
            context.preemption.leave(step + 1)
    return {f"rl.{name}": value / stage.steps for name, value in sums.items()}


def settings(stage: Rl, context: Context) -> dict[str, Any]:
    """What log-probabilities and the cut of a step depend on, and a replay must therefore share."""
    return {
        "temperature": stage.temperature,
        "updates_per_step": stage.updates_per_step,
        "masked_ids": list(masked_ids(context.processor)),
        "vocabulary": hashlib.sha256(json.dumps(sorted(context.tokenizer.get_vocab().items())).encode()).hexdigest(),
    }


def _require_same(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless the record was made with these settings."""
    found = read_json(folder / SETTINGS)
    if found is None:
        raise ValueError(f"{folder / SETTINGS} is missing: {folder} is no record; name the folder of a `record`")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder / SETTINGS}: it was recorded with another {name} than the stage that replays it has "
                f"({found.get(name)!r}, {value!r}): its log-probabilities would mean something else"
            )


def write_step(folder: Path, version: int, parts: list[Part]) -> None:
    """Write what the step after `version` saw."""
    found = [
        {
            "index": part.index,
            "kept": [any(group is kept for kept in part.kept) for group in part.seen],
            "seen": [_as_json(group, folder / "media") for group in part.seen],
        }
        for part in parts
    ]
    write_text(_step(folder, version), json.dumps({"parts": found}))


def read_step(folder: Path, version: int) -> list[Part]:
    """What `write_step` wrote. Raises ValueError naming a file that is missing or holds something else."""
    path = _step(folder, version)
    found = read_json(path)
    if found is None:
        steps = len(list(folder.glob("step-*.json")))
        raise ValueError(f"{path} is missing: the record has {steps} steps; lower `steps`, or record more")
    try:
        return [_part(each, folder / "media") for each in found["parts"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no step of a record ({type(error).__name__}: {error}); record it again") from error


def _step(folder: Path, version: int) -> Path:
    return folder / f"step-{version:06d}.json"


def _as_json(group: Group, folder: Path) -> dict[str, Any]:
    """The group without its pictures, which go to files of their own."""
    found = asdict(group)
    for item, media in zip(found["prompt"]["media"], group.prompt.media, strict=True):
        item["data"] = hashlib.sha256(media.data).hexdigest()
        path = folder / item["data"]
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".partial-{path.name}")
            partial.write_bytes(media.data)
            partial.replace(path)
    # columns of a row may hold what JSON has no form for
    found["prompt"]["columns"] = json.loads(json.dumps(found["prompt"]["columns"], default=str))
    return found


def _part(found: Mapping[str, Any], folder: Path) -> Part:
    seen = [_group(each, folder) for each in found["seen"]]
    kept = [group for group, learned in zip(seen, found["kept"], strict=True) if learned]
    return Part(found["index"], kept, seen, alone=True)


def _group(found: Mapping[str, Any], folder: Path) -> Group:
    prompt = dict(found["prompt"])
    prompt["token_ids"] = tuple(prompt["token_ids"])
    prompt["media"] = tuple(_media(item, folder) for item in prompt["media"])
    return Group(
        Prompt(**prompt),
        tuple(found["prompt_ids"]),
        tuple(
            Rollout(**r | {name: tuple(r[name]) for name in ("token_ids", "logprobs", "versions")})
            for r in found["rollouts"]
        ),
        tuple(Score(**score) for score in found["scores"]),
    )


def _media(found: Mapping[str, Any], folder: Path) -> Media:
    path = folder / found["data"]
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != found["data"]:
        raise ValueError(f"{path} is missing or was changed; record it again")
    return Media.of(found, data)
