"""Weights in memory of a device: what is put is opened or received, bit for bit. On a CPU the memory is opened by a
number, and lines are of gloo."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from actors.device import ALIGNMENT, Copies, DeviceBucket, Line, Opened, SentBucket, listen

CPU = torch.device("cpu")
HOST, SECONDS = "127.0.0.1", 20.0
Part = list[tuple[str, Tensor]]


def part(seed: int, rows: int = 5) -> Part:
    draw = torch.Generator().manual_seed(seed)
    return [
        ("a", torch.randn(rows, 7, generator=draw)),
        ("bfloat16", torch.randn(3, generator=draw).bfloat16()),
        ("turned", torch.randn(4, rows, generator=draw).T),
        ("one", torch.randn((), generator=draw, dtype=torch.float64)),
        ("none", torch.empty(0, 2)),
    ]


def same(found: Part, wanted: Part) -> bool:
    return [name for name, _ in found] == [name for name, _ in wanted] and all(
        got.dtype == value.dtype and torch.equal(got, value) for (_, got), (_, value) in zip(found, wanted, strict=True)
    )


class Handles:
    """In the place of CUDA's: a number for every memory that was exported, and how often it was opened."""

    def __init__(self) -> None:
        self.exported: list[Tensor] = []
        self.opened = 0

    def export(self, memory: Tensor) -> int:
        self.exported.append(memory)
        return len(self.exported) - 1

    def open(self, handle: int, device: torch.device) -> Tensor:
        assert device == CPU
        self.opened += 1
        return self.exported[handle]


def publish(copies: Copies, parts: list[Part]) -> list[DeviceBucket]:
    found = [copies.shared(index, copies.put(index, one)[1]) for index, one in enumerate(parts)]
    copies.finish()
    return found


def test_what_is_put_is_read_in_place_and_the_next_takes_its_memory() -> None:
    handles = Handles()
    copies, opened = Copies(CPU, export=handles.export), Opened(CPU, handles.open)
    parts = [part(index) for index in range(3)]
    before = publish(copies, parts)
    first = [opened.read(bucket) for bucket in before]
    assert all(map(same, first, parts))
    assert all(offset % ALIGNMENT == 0 for *_, offset in before[0].places)
    parts[0][0][1].zero_()  # the trainer learns on beside the copy
    assert not same(first[0], parts[0])
    again = [part(index + 10) for index in range(3)]
    assert publish(copies, again) == before
    assert all(map(same, first, again))
    assert (len(handles.exported), handles.opened) == (3, 3)


def test_a_larger_model_gets_other_memory_and_the_old_is_let_go() -> None:
    handles = Handles()
    copies, opened = Copies(CPU, export=handles.export), Opened(CPU, handles.open)
    old = publish(copies, [part(index) for index in range(3)])
    for bucket in old:
        opened.read(bucket)
    parts = [part(index, rows=50) for index in range(2)]
    new = publish(copies, parts)
    assert all(map(same, map(opened.read, new), parts))
    opened.keep(new)
    opened.read(new[0])
    assert handles.opened == 5
    opened.read(old[0])  # opened anew: it was let go
    assert handles.opened == 6


def test_an_engine_on_another_gpu_is_told_so() -> None:
    with pytest.raises(RuntimeError, match=r"in the memory of GPU-1, GPU-2 and this engine is on cpu: .* \"nccl\""):
        Opened(CPU).read(DeviceBucket({"GPU-2": ("x", 0)}, ()) | DeviceBucket({"GPU-1": ("y", 0)}, ()))


@pytest.fixture
def ends() -> Iterator[list[Line]]:
    """A line of the trainer and two processes of an engine."""
    store = listen(HOST, SECONDS)
    with ThreadPoolExecutor(3) as pool:
        joining = [pool.submit(Line.join, f"{HOST}:{store.port}", rank, 3, CPU, SECONDS) for rank in (1, 2)]
        first = Line(store, 0, 3, CPU, SECONDS)
        yield [first, *(one.result(SECONDS) for one in joining)]


def test_what_is_sent_arrives_everywhere_in_order(ends: list[Line]) -> None:
    copies, parts = Copies(CPU, export=Handles().export), [part(index, rows=index + 1) for index in range(3)]
    buckets = [SentBucket(*copies.put(index, one)) for index, one in enumerate(parts)]
    found: dict[int, list[Part]] = {}

    def receive(rank: int) -> None:
        found[rank] = [ends[rank].receive(bucket) for bucket in buckets]

    receiving = [threading.Thread(target=receive, args=(rank,), daemon=True) for rank in (1, 2)]
    for thread in receiving:
        thread.start()
    for index, bucket in enumerate(buckets):
        ends[0].send(copies.sent(index, bucket.size))
    for thread in receiving:
        thread.join(SECONDS)
    for rank in (1, 2):
        assert all(map(same, found[rank], parts))


def test_nobody_waits_for_ever_for_the_other_end() -> None:
    store = listen(HOST, SECONDS)
    with pytest.raises(RuntimeError):
        Line(store, 0, 2, CPU, 0.3)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(Line.join, f"{HOST}:{store.port}", 1, 2, CPU, 1.0)
        Line(store, 0, 2, CPU, 1.0)
        with pytest.raises(RuntimeError):
            joining.result(SECONDS).receive(SentBucket(8, ()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_process_reads_the_gpus_memory() -> None:
    device = torch.device("cuda", 0)
    copies, wanted = Copies(device), [(name, value.to(device)) for name, value in part(0)]
    buckets = publish(copies, [wanted])
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    reading = context.Process(target=_read, args=(buckets[0], answers))
    reading.start()
    assert answers.get(timeout=60) == [(name, value.tolist()) for name, value in part(0)]
    reading.join(60)


def _read(bucket: DeviceBucket, answers: object) -> None:
    found = Opened(torch.device("cuda", 0)).read(bucket)
    answers.put([(name, value.tolist()) for name, value in found])  # type: ignore[attr-defined]
