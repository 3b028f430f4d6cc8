"""How an engine takes the weights that a trainer publishes, or that lie in an artifact.

The trainer cuts its parameters into buckets; a `Publication` carries handles, and the rollout worker gives each to its
engine, between `start` and `finish`. The recipe's `resources.transport` says where a bucket lies:

    shm    memory that the processes of one node share (`actors.shared`)
    cpu    Ray's object store, for any node
    ipc    GPU memory of the trainer, for engines on the same GPU (`actors.device`)
    nccl   the same, sent over a process group, for engines on other GPUs
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from actors.device import DeviceBucket, Line, Opened, SentBucket
from actors.shared import Bucket, Reader, SharedBucket

AnyBucket = Bucket | SharedBucket | DeviceBucket | SentBucket


class CoverageError(RuntimeError):
    """A publication and an engine's model do not cover each other; the message names the parameters."""


def from_array(array: NDArray[Any]) -> torch.Tensor:
    """The tensor an array of a bucket stands for; shares its memory."""
    with warnings.catch_warnings():
        # arrays out of the object store are read-only; they are only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def fetch(bucket: Any, deadline: float) -> Any:
    """What an engine takes: the object itself of a reference into Ray's object store, which engines' own ranks cannot
    read, awaited `deadline` seconds at most; any other bucket as it is."""
    return ray.get(bucket, timeout=deadline) if isinstance(bucket, ray.ObjectRef) else bucket


class Receiver:
    """An engine's side of publications: what a bucket holds, wherever it lies, and whether all of them held what was
    published."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reader, self._opened = Reader(), Opened(device)
        self._line: Line | None = None
        self.begin()

    def join(self, address: str, rank: int, size: int, timeout: float) -> None:
        """Join the trainer's line as `rank` of `size`; without one, buckets that are sent cannot be received."""
        self._line = Line.join(address, rank, size, self.device, timeout)

    def begin(self) -> None:
        """Another publication."""
        self._names: dict[str, tuple[int, ...]] = {}
        self._received: dict[str, tuple[int, ...]] = {}
        self._read: list[SharedBucket | DeviceBucket] = []

    def take(self, bucket: AnyBucket, names: Mapping[str, tuple[int, ...]]) -> list[tuple[str, torch.Tensor]]:
        """What a bucket holds of a publication of these names."""
        found = self._tensors(bucket)
        self._names.update(names)
        self._received.update((name, tuple(value.shape)) for name, value in found)
        return found

    def check(self) -> None:
        """Raise CoverageError unless the buckets held exactly the published names with their shapes."""
        check_received(self._names, self._received)

    def finish(self) -> None:
        """What was read may be written over from now on."""
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)
        self._reader.keep(bucket for bucket in self._read if isinstance(bucket, SharedBucket))
        self._opened.keep(bucket for bucket in self._read if isinstance(bucket, DeviceBucket))

    def _tensors(self, bucket: AnyBucket) -> list[tuple[str, torch.Tensor]]:
        if isinstance(bucket, SharedBucket | DeviceBucket):
            self._read.append(bucket)
        if isinstance(bucket, DeviceBucket):
            return self._opened.read(bucket)
        if isinstance(bucket, SentBucket):
            if self._line is None:
                raise RuntimeError("weights are sent, and this engine has no line to the trainer")
            return self._line.receive(bucket)
        arrays = self._reader.read(bucket) if isinstance(bucket, SharedBucket) else bucket
        return [(name, from_array(array)) for name, array in arrays]


def check_received(published: Mapping[str, tuple[int, ...]], received: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CoverageError unless the buckets held exactly the published names, each with its shape."""
    problems = []
    if missing := [name for name in published if name not in received]:
        problems.append(f"missing {some(missing)}")
    if unexpected := [name for name in received if name not in published]:
        problems.append(f"unexpected {some(unexpected)}")
    shapes = [
        f"{name} {list(received[name])} instead of {list(shape)}"
        for name, shape in published.items()
        if name in received and tuple(received[name]) != tuple(shape)
    ]
    if shapes:
        problems.append(f"wrong shapes {some(shapes)}")
    if problems:
        raise CoverageError("the buckets are not what was published: " + "; ".join(problems))


def some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
