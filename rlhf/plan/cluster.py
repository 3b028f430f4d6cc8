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
    """What there is to run on. gpu_memory_gib is that of the smallest GPU, None where it is not known."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    gpu_memory_gib: float | None = None

    @classmethod
    def here(cls) -> Cluster:
        """This machine, as this process may use it: affinity and control-group limits count."""
        gpus = _gpu_memories()
        smallest = min(gpus) if gpus else None
        return cls(len(os.sched_getaffinity(0)), _memory_bytes() / GIB, len(gpus), smallest)


def _memory_bytes() -> int:
    """Of the machine, or of the control group this process is held to, whichever is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            found.append(int(limit))
    return min(found)


def _gpu_memories() -> list[float]:
    """GiB of each NVIDIA GPU, as nvidia-smi says; none where there is no nvidia-smi or no driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    asked = subprocess.run(
        [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return [float(line) / 1024 for line in asked.stdout.split()] if asked.returncode == 0 else []
