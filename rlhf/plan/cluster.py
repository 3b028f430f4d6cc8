"""What there is to run on: nodes with cores, memory and GPUs, those here or those of a site file."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rlhf.architecture import GIB
from rlhf.recipe import ClusterTable


@dataclass(frozen=True)
class Node:
    """One machine, as a job may use it. gpu_memory_gib: of its smallest GPU, None where that is not known."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    gpu_memory_gib: float | None = None


@dataclass(frozen=True)
class Cluster:
    """What there is to run on: one node or several."""

    nodes: tuple[Node, ...]

    @classmethod
    def here(cls) -> Cluster:
        """This machine, as this process may use it: affinity and control-group limits count."""
        gpus = _gpu_memories()
        known = [memory for memory in gpus if memory is not None]
        smallest = min(known) if known else None
        return cls((Node(len(os.sched_getaffinity(0)), _memory_bytes() / GIB, len(gpus), smallest),))

    @classmethod
    def of(cls, table: ClusterTable) -> Cluster:
        """The machines that `[cluster] nodes` describes."""
        return cls(
            tuple(
                Node(kind.cpus, kind.memory_gib, kind.gpus, kind.gpu_memory_gib)
                for kind in table.nodes
                for _ in range(kind.count)
            )
        )

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def memory_gib(self) -> float:
        return sum(node.memory_gib for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    @property
    def most_gpus(self) -> int:
        """Of one node: what an engine's tensor-parallel group can have."""
        return max(node.gpus for node in self.nodes)

    @property
    def gpu_memory_gib(self) -> float | None:
        """Of the smallest GPU whose memory is known."""
        known = [node.gpu_memory_gib for node in self.nodes if node.gpus and node.gpu_memory_gib is not None]
        return min(known) if known else None

    def __str__(self) -> str:
        """In words, such as "4 nodes of 96 cores, 1024.0 GiB, 8 GPUs of 80 GiB"."""
        kinds = Counter(self.nodes)
        if len(self.nodes) == 1:
            return f"machine: {_in_words(self.nodes[0])}"
        return "; ".join(f"{count} node{'s' * (count > 1)} of {_in_words(node)}" for node, count in kinds.items())


def _in_words(node: Node) -> str:
    gpus = f"{node.gpus} GPUs" + (f" of {node.gpu_memory_gib:g} GiB" if node.gpus and node.gpu_memory_gib else "")
    return f"{node.cpus} cores, {node.memory_gib:.1f} GiB, {gpus}"


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
