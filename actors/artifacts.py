"""Reading artifacts of the run from disk for an engine that is already running: weights and probe scores."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from rlhf.architecture import chain_of
from rlhf.types import Media, Probe, ProbeScores

PROBES = "probe_scores.json"


def read_weights(folder: Path) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """(name, array) of every parameter; a peft folder gives its base with the adapters merged in, innermost first.
    Half precision comes as float32, which holds it exactly: numpy has no bfloat16."""
    *adapters, base = chain_of(folder)
    weights = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            weights.update({name: tensors.get_tensor(name).float().numpy() for name in tensors.keys()})  # noqa: SIM118
    for adapter in reversed(adapters):
        _merge(adapter, weights)
    return list(weights.items())


def write_probes(folder: Path, probes: Sequence[Probe], scores: ProbeScores) -> None:
    """Leave the trainer's log-probs on the probes beside the weights: whoever loads them can check them."""
    rows = [
        {
            "token_ids": probe.token_ids,
            "media": [{**asdict(m), "data": base64.b64encode(m.data).decode()} for m in probe.media],
        }
        for probe in probes
    ]
    (folder / PROBES).write_text(json.dumps({"probes": rows, "scores": asdict(scores)}))


def read_probes(folder: Path) -> tuple[list[Probe], ProbeScores] | None:
    """What write_probes left, or None for a folder that did not come from a trainer of ours."""
    path = folder / PROBES
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    probes = [
        Probe(
            tuple(row["token_ids"]),
            tuple(Media.of(item, base64.b64decode(item["data"])) for item in row["media"]),
        )
        for row in saved["probes"]
    ]
    scores = saved["scores"]
    return probes, ProbeScores(
        expanded_ids=_tuples(scores["expanded_ids"]),
        logprobs=_tuples(scores["logprobs"]),
        margins=_tuples(scores["margins"]),
        experts_reached={name: tuple(reached) for name, reached in scores["experts_reached"].items()},
        experts_total=scores["experts_total"],
    )


def _tuples(rows: list[list[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _merge(folder: Path, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    """W + (alpha / r)·B·A for every adapted weight (LoRA, arXiv 2106.09685). Not by peft: in an engine's process vLLM
    has changed the decoder classes, and transformers can build no model of its own."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if ".lora_A." in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                down, up = tensors.get_tensor(name), tensors.get_tensor(name.replace(".lora_A.", ".lora_B."))
                weights[target] = weights[target] + scale * (up @ down)
