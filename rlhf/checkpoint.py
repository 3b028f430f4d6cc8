"""Atomic saves: a folder appears under its final name only when it is whole.

stage/checkpoints/step-000040/   trainer/ (DeepSpeed) and state.json, written under a temporary name, then renamed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.roles import Trainer

KEEP = 2  # whole checkpoints a stage keeps: the latest, and one to fall back on


class CheckpointError(RuntimeError):
    """A save that could not be finished or a checkpoint that is damaged; names the folder and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: where the trainer's state lies, and the loop's own state."""

    folder: Path
    step: int
    state: Mapping[str, Any]

    @property
    def trainer(self) -> Path:
        return self.folder / "trainer"


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Write into a temporary folder that becomes `folder` if and only if the block succeeds."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except TimeoutError:  # an OSError by descent, but of an actor, not of the disk
        raise
    except OSError as error:
        raise CheckpointError(
            f"{folder}: could not be written ({error.strerror or error}); nothing partial was left under this name. "
            "Free some space (or fix the permissions) and run the same command again: it continues from the last "
            "whole checkpoint"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole or not there."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True))


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None without a file. Raises CheckpointError for one that is damaged."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it, and the same command makes it again") from error


def finish(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Complete a checkpoint being written: the loop's state, and a digest of what the trainer wrote."""
    write_json(folder / "state.json", {"step": step, "state": state, "trainer_digest": digest(folder / "trainer")})


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint under root, its trainer state verified; None when there is none.

    The digest is checked before anything is unpickled. Raises CheckpointError when the newest one is damaged.
    """
    for folder in sorted(root.glob("step-*"), reverse=True):
        saved = read_json(folder / "state.json")
        if saved is None or digest(folder / "trainer") != saved["trainer_digest"]:
            raise CheckpointError(
                f"{folder}: its files changed since they were written; delete this folder to continue from the one "
                "before it"
            )
        return Checkpoint(folder, saved["step"], saved["state"])
    return None


def prune(root: Path) -> None:
    """Remove all but the newest checkpoints."""
    for folder in sorted(root.glob("step-*"), reverse=True)[KEEP:]:
        shutil.rmtree(folder)


class Restorable(Protocol):
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


async def resume(trainer: Trainer, parts: Mapping[str, Restorable], found: Checkpoint | None) -> int:
    """Put the trainer and the named parts of the loop back to a checkpoint; returns the step to go on from."""
    if found is None:
        return 0
    await trainer.restore(found.trainer)
    for name, part in parts.items():
        part.restore(found.state[name])
    return found.step


async def save(trainer: Trainer, checkpoints: Path, step: int, state: Mapping[str, Any]) -> float:
    """Write a whole checkpoint; returns the seconds it took."""
    started = time.perf_counter()
    with whole(checkpoints / f"step-{step:06d}") as partial:
        await trainer.save(partial / "trainer")
        finish(partial, step, state)
    prune(checkpoints)
    return time.perf_counter() - started


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of every file under folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
