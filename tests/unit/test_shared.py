"""Weights in memory that processes share: what is put is read, in the same memory, and it ends with its owner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actors.shared import ALIGNMENT, Bucket, Owner, Reader, SharedBucket

DEADLINE = 60
OTHER = """
import sys
import numpy as np
from actors.shared import Owner, Reader, SharedBucket
if sys.argv[1] == "own":
    print(Owner().put(0, [("w", np.arange(3.0))]), flush=True)
    sys.stdin.read()
else:
    print({name: array.tolist() for name, array in Reader().read(eval(sys.argv[2]))})
"""


def bucket(seed: int, rows: int = 5) -> Bucket:
    draw = np.random.default_rng(seed)
    return [
        ("a", draw.normal(size=(rows, 7)).astype(np.float32)),
        ("bfloat16", draw.integers(0, 2**16, (3,)).astype(np.uint16)),
        ("turned", draw.normal(size=(4, rows)).astype(np.float32).T),
        ("one", np.asarray(draw.normal(), dtype=np.float64)),
    ]


def same(found: Bucket, wanted: Bucket) -> bool:
    return [name for name, _ in found] == [name for name, _ in wanted] and all(
        got.dtype == array.dtype and np.array_equal(got, array)
        for (_, got), (_, array) in zip(found, wanted, strict=True)
    )


def test_what_is_put_is_read_and_the_next_takes_its_memory() -> None:
    owner, reader = Owner(), Reader()
    before = [owner.put(index, bucket(index)) for index in range(3)]
    first = [reader.read(one) for one in before]
    assert all(same(found, bucket(index)) for index, found in enumerate(first))
    assert all(offset % ALIGNMENT == 0 for *_, offset in before[0].places)
    assert not first[0][0][1].flags.writeable
    after = [owner.put(index, bucket(index + 10)) for index in range(3)]
    assert after == before
    assert all(same(found, bucket(index + 10)) for index, found in enumerate(first))


def test_a_larger_model_gets_other_memory_and_the_old_goes() -> None:
    owner, reader = Owner(), Reader()
    old = [owner.put(index, bucket(index)) for index in range(3)]
    held = [reader.read(one) for one in old]
    new = [owner.put(index, bucket(index, rows=50)) for index in range(2)]
    owner.trim(2)
    assert {one.identity for one in new}.isdisjoint(one.identity for one in old)
    assert same(held[1], bucket(1))  # who has it mapped may still read it
    assert all(same(reader.read(one), bucket(index, rows=50)) for index, one in enumerate(new))
    assert len(mapped()) == 2 + 5
    del held
    reader.keep(new)
    assert len(mapped()) == 2 + 2
    with pytest.raises(RuntimeError, match="cannot be read here"):
        Reader().read(old[2])


def mapped() -> list[str]:
    """Mappings of this process that hold weights: an owner's, and a reader's."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:weights" in line]


def test_another_process_reads_it() -> None:
    owner = Owner()
    put = owner.put(0, [("w", np.arange(6, dtype=np.float32).reshape(2, 3))])
    command = [sys.executable, "-c", OTHER, "read", repr(put)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert found.stdout.strip() == "{'w': [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]}"


def test_memory_of_an_owner_that_was_killed_is_gone() -> None:
    command = [sys.executable, "-c", OTHER, "own"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        put = eval(process.stdout.readline(), {"SharedBucket": SharedBucket})
        assert same(Reader().read(put), [("w", np.arange(3.0))])
        process.kill()
        process.wait(DEADLINE)
    with pytest.raises(RuntimeError, match="on one node only"):
        Reader().read(put)
