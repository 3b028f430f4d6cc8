"""Buckets of weights in memory that the processes of one node share: copied once, read in place.

The memory has no file (memfd), so it is gone with the last process that holds it, however that one ends. A publish
writes again what the publish before wrote, and a reader keeps what it has mapped: neither pays for fresh pages.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bucket = list[tuple[str, NDArray[Any]]]  # parameters by name
Place = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, offset
ALIGNMENT = 64  # bytes: where an array may begin


@dataclass(frozen=True)
class SharedBucket:
    """A bucket in an owner's memory: `path` as long as that process lives, `identity` tells it from others that had
    the same path."""

    path: str
    identity: int
    size: int
    places: tuple[Place, ...]


class Owner:
    """The side that writes. A bucket is good until the next of its index."""

    def __init__(self) -> None:
        self._held: list[tuple[int, mmap.mmap]] = []  # descriptor and memory of each index

    def put(self, index: int, bucket: Bucket) -> SharedBucket:
        """Copy a bucket into the memory of `index`: those below have been put before."""
        places, size = list[Place](), 0
        for name, array in bucket:
            places.append((name, array.dtype.str, tuple(array.shape), size))
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if index == len(self._held) or len(self._held[index][1]) < size:
            self.trim(index)  # those after it are of another model too
            descriptor = os.memfd_create(f"weights-{index}")
            os.ftruncate(descriptor, max(size, 1))
            self._held.append((descriptor, mmap.mmap(descriptor, 0)))
        descriptor, memory = self._held[index]
        for place, (_, array) in zip(places, bucket, strict=True):
            # torch copies with all of its threads
            torch.from_numpy(_view(memory, place)).copy_(torch.from_numpy(array))
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return SharedBucket(path, os.fstat(descriptor).st_ino, len(memory), tuple(places))

    def trim(self, count: int) -> None:
        """Give up all but the first `count` buckets. Who has mapped one may still read it."""
        for descriptor, _ in self._held[count:]:
            os.close(descriptor)
        del self._held[count:]


class Reader:
    """The side that reads."""

    def __init__(self) -> None:
        self._mapped: dict[int, mmap.mmap] = {}  # by identity

    def read(self, bucket: SharedBucket) -> Bucket:
        """The bucket's arrays, read-only, in the owner's memory. Raises RuntimeError when it is not to be had."""
        if bucket.identity not in self._mapped:
            self._mapped[bucket.identity] = _map(bucket)
        memory = self._mapped[bucket.identity]
        return [(place[0], _view(memory, place)) for place in bucket.places]

    def keep(self, buckets: Iterable[SharedBucket]) -> None:
        """Let go of all other memory."""
        wanted = {bucket.identity for bucket in buckets}
        self._mapped = {identity: memory for identity, memory in self._mapped.items() if identity in wanted}


def _map(bucket: SharedBucket) -> mmap.mmap:
    try:
        descriptor = os.open(bucket.path, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_ino == bucket.identity:
                return mmap.mmap(descriptor, bucket.size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        reason = "it holds something else by now"
    except OSError as error:
        reason = str(error.strerror)
    raise RuntimeError(
        f"the trainer's memory {bucket.path} cannot be read here ({reason}): weights go by shared memory on one node "
        'only; set resources.transport = "cpu"'
    )


def _view(memory: mmap.mmap, place: Place) -> NDArray[Any]:
    _, kind, shape, offset = place
    return np.ndarray(shape, np.dtype(kind), memory, offset)
