"""Weights on their way without the host: a copy in the trainer's GPU memory, which engines on the same GPU read in
place (CUDA IPC), or which is sent to engines on other GPUs (NCCL; gloo where there are only CPUs).

The trainer learns on beside the copy, so an engine that is started again takes the very version it was lost with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

ALIGNMENT = 64  # bytes: where a tensor may begin
Part = Sequence[tuple[str, Tensor]]  # parameters by name
Place = tuple[str, torch.dtype, tuple[int, ...], int]  # name, dtype, shape, offset


@dataclass(frozen=True)
class DeviceBucket:
    """A bucket in GPU memory of trainer ranks: by a GPU's UUID, how a process on that GPU opens it, and `identity`,
    which no other memory has."""

    handles: Mapping[str, tuple[str, Any]]
    places: tuple[Place, ...]

    def __or__(self, other: DeviceBucket) -> DeviceBucket:
        """The same bucket, on the GPUs of both."""
        return DeviceBucket({**self.handles, **other.handles}, self.places)


@dataclass(frozen=True)
class SentBucket:
    """A bucket that comes over the engine's `Line`, after those before it."""

    size: int
    places: tuple[Place, ...]


class Copies:
    """The trainer's side: buckets in memory of their own on one device. A bucket is good until the next of its index;
    a publish writes where the one before it wrote."""

    def __init__(self, device: torch.device, room: int = 0, export: Callable[[Tensor], Any] | None = None) -> None:
        """Each memory has `room` for so many bytes, or for its first bucket where that is larger."""
        self.device, self._room = device, room
        self._export = export or _export
        self._held: list[tuple[Tensor, tuple[str, Any] | None]] = []
        self._serial = count()

    def put(self, index: int, part: Part) -> tuple[int, tuple[Place, ...]]:
        """Copy a bucket into the memory of `index` (those below have been put before); its bytes and places."""
        places, size = list[Place](), 0
        for name, value in part:
            places.append((name, value.dtype, tuple(value.shape), size))
            size += -(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT
        if index == len(self._held) or self._held[index][0].numel() < size:
            # kept for good: torch frees exported memory only where it is opened exactly once
            memory = torch.empty(max(size, self._room, 1), dtype=torch.uint8, device=self.device)
            self._held[index : index + 1] = [(memory, None)]
        memory, _ = self._held[index]
        for place, (_, value) in zip(places, part, strict=True):
            _view(memory, place).copy_(value)
        return size, tuple(places)

    def sent(self, bucket: int, size: int) -> Tensor:
        """The bytes of a bucket."""
        return self._held[bucket][0][:size]

    def shared(self, index: int, places: tuple[Place, ...]) -> DeviceBucket:
        """How a process on the same GPU opens the bucket; call `finish` before it does."""
        memory, handle = self._held[index]
        if handle is None:
            handle = (f"{os.getpid()}.{next(self._serial)}", self._export(memory))
            self._held[index] = memory, handle
        return DeviceBucket({uuid_of(self.device): handle}, places)

    def finish(self) -> None:
        """Wait until what was put is there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Opened:
    """The engine's side of IPC: what it has opened of the trainer's memory."""

    def __init__(self, device: torch.device, open_: Callable[[Any, torch.device], Tensor] | None = None) -> None:
        self.device = device
        self._open = open_ or _open
        self._memory: dict[str, Tensor] = {}  # by identity

    def read(self, bucket: DeviceBucket) -> list[tuple[str, Tensor]]:
        """The bucket's tensors, in the trainer's memory. Raises RuntimeError where that is on no GPU it sees."""
        uuid = uuid_of(self.device)
        if uuid not in bucket.handles:
            raise RuntimeError(
                f"the weights are in the memory of {', '.join(sorted(bucket.handles))} and this engine is on {uuid}: "
                'ipc needs a trainer rank on every engine\'s GPU; set resources.transport = "nccl" or "shm"'
            )
        identity, handle = bucket.handles[uuid]
        if identity not in self._memory:
            self._memory[identity] = self._open(handle, self.device)
        return tensors_of(self._memory[identity], bucket.places)

    def keep(self, buckets: Iterable[DeviceBucket]) -> None:
        """Let go of all other memory."""
        wanted = {identity for bucket in buckets for identity, _ in bucket.handles.values()}
        self._memory = {identity: memory for identity, memory in self._memory.items() if identity in wanted}


class Line:
    """A process group of the trainer's first rank, which is rank 0 and sends, and the processes of one engine. Each
    call ends with an error after `timeout` seconds."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, timeout: float) -> None:
        self.device, self._timeout = device, timedelta(seconds=timeout)
        prefixed = PrefixStore("line", store)
        # NCCL itself waits for the others without a limit
        prefixed.set(str(rank), "here")
        prefixed.wait([str(other) for other in range(size)], self._timeout)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            # else a watchdog ends the process where a call took too long; read when the group is made
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
            self._group: Any = dist.ProcessGroupNCCL(prefixed, rank, size, options)
            del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
        else:
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, timeout=self._timeout)
        self._broadcast(torch.zeros(1, dtype=torch.uint8, device=device))  # NCCL connects at the first

    @classmethod
    def join(cls, address: str, rank: int, size: int, device: torch.device, timeout: float) -> Line:
        """The engine's end, of a store that listens at `address` ("host:port")."""
        host, _, port = address.rpartition(":")
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout))
        return cls(store, rank, size, device, timeout)

    def send(self, memory: Tensor) -> None:
        """Give the bytes to every process of the engine."""
        self._broadcast(memory)

    def receive(self, bucket: SentBucket) -> list[tuple[str, Tensor]]:
        """The bucket's tensors, in memory of their own."""
        memory = torch.empty(bucket.size, dtype=torch.uint8, device=self.device)
        self._broadcast(memory)
        return tensors_of(memory, bucket.places)

    def _broadcast(self, memory: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([memory], options).wait(self._timeout)


def listen(host: str, timeout: float) -> TCPStore:
    """A store on a free port of this host, where the ends of a line, or the ranks of a group, find each other. Whoever
    in this process then asks for one on that port gets the same: no other job can take it in between."""
    seconds = timedelta(seconds=timeout)
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=seconds, multi_tenant=True)


def tensors_of(memory: Tensor, places: Sequence[Place]) -> list[tuple[str, Tensor]]:
    """The tensors that lie in a bucket's bytes."""
    return [(place[0], _view(memory, place)) for place in places]


def _view(memory: Tensor, place: Place) -> Tensor:
    _, dtype, shape, offset = place
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)


def uuid_of(device: torch.device) -> str:
    """Which device it is, in whatever process it is asked."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def _export(memory: Tensor) -> Any:
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(memory)
    return arguments


def _open(handle: Any, device: torch.device) -> Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    # the seventh is the device's number, which is another in a process that sees other devices
    rebuild: Callable[..., Tensor] = rebuild_cuda_tensor
    return rebuild(*handle[:6], device.index or 0, *handle[7:])
