"""What there is to run on: cores, memory and GPUs, as this process may use them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rlhf.architecture import GIB


@dataclass(frozen=True)
class Cluster:
    """What there is to run on, all nodes together. gpu_memory_gib is that of the smallest GPU, None where it is not
    known."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    gpu_memory_gib: float | None = None
    nodes: int = 1

    @classmethod
    def here(cls) -> Cluster:
        """This machine, as this process may use it: affinity and control-group limits count."""
        gpus = _gpu_memories()
        known = [memory for memory in gpus if memory is not None]
        smallest = min(known) if known else None
        return cls(len(os.sched_getaffinity(0)), _memory_bytes() / GIB, len(gpus), smallest)


def _memory_bytes() -> int:
    """Of the machine, or of the control group this process is held to, whichever is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            found.append(int(limit))
    return min(found)


def _gpu_memories() -> list[float | None]:
    """GiB of each NVIDIA GPU this process may use, as nvidia-smi says, None where it does not know; none without a
    driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return []
    if asked.returncode != 0:
        return []
    gpus = [[field.strip() for field in line.split(",")] for line in asked.stdout.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name.strip() for name in visible.split(",")]
        slices = [["", name, ""] for name in named if name.startswith("MIG-")]  # of a GPU, of a size it does not tell
        gpus = [gpu for gpu in gpus if any(name == gpu[0] or (name and gpu[1].startswith(name)) for name in named)]
        gpus += slices
    return [float(gpu[2]) / 1024 if gpu[2].isdigit() else None for gpu in gpus]
