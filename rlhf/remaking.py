"""Stages that make a model of others, without training: another bridge with the same weights, and a model soup
(2203.05482; SAIL-VL2 §4: after fine-tuning)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import rlhf.bridge
from rlhf.architecture import base_of
from rlhf.bridge.builder import new
from rlhf.bridge.rebuilding import rebuilt
from rlhf.checkpoint import whole, write_json
from rlhf.data.rows import DataError
from rlhf.foreign import open_model
from rlhf.models import load_processor
from rlhf.recipe import Merge, Rebuild, Recipe, RecipeError, Sft, Slot
from rlhf.stage import Context, GateError, derive


def rebuild(stage: Rebuild, context: Context, parts: Mapping[Slot, Path]) -> dict[str, float]:
    """Another bridge of the stage's model, and how many of its parameters come from where."""
    model, processor, _ = open_model(str(context.model))  # adapters merged in
    if not isinstance(model, rlhf.bridge.BridgeForConditionalGeneration):
        raise DataError(f"stage {stage.name!r}: {context.model} holds no bridge, and only bridges are rebuilt")
    seed = derive(context.recipe.seed, stage.name, "rebuild") % 2**31
    made, processor, counts = rlhf.bridge.rebuild(model, processor, stage.bridge, parts, seed)
    metrics = {f"rebuild.{name}": float(value) for name, value in counts.items()}
    write_json(context.folder / "made.json", metrics)
    with whole(context.folder / "artifact") as partial:
        made.save_pretrained(partial)
        processor.save_pretrained(partial)
    return metrics


def require_rebuildable(recipe: Recipe, folder: Path) -> None:
    """Make the config of every rebuild stage, so that a key or token that it cannot have is told before the first
    stage. Raises RecipeError naming the stage."""
    processor, made = load_processor(base_of(folder)), dict[str, Any]()
    first = AutoConfig.from_pretrained(base_of(folder))
    for stage in recipe.stages:
        parent = recipe.parent_of(stage)
        config = made[parent] if parent else first
        if isinstance(stage, Rebuild) and not isinstance(first, rlhf.bridge.BridgeConfig):
            raise RecipeError(f"stages.{stage.name}: {folder} holds no bridge, and only bridges are rebuilt")
        if isinstance(stage, Sft) and stage.upcycle is not None:
            config = None  # experts come later than this looks
        if isinstance(stage, Rebuild) and config is not None:
            try:
                config, _ = rebuilt(config, stage.bridge, processor)
                with torch.device("meta"):  # what only its modules refuse
                    new(config, seed=0)
            except ValueError as error:
                raise RecipeError(f"stages.{stage.name}.bridge: {error}") from error
        made[stage.name] = config


async def merge(
    stage: Merge,
    context: Context,
    folders: Mapping[str, Path],
    fit: Callable[[Path], Awaitable[Mapping[str, float]]],
) -> dict[str, float]:
    """The average of the models in `folders`, and what it and they lose, as `fit` measures. Raises GateError where that
    is too much more."""
    partial = context.folder / "merged"
    shutil.rmtree(partial, ignore_errors=True)
    model, processor = await asyncio.to_thread(average, list(folders.values()), list(stage.of.values()))
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    losses = {name: (await fit(folder))["eval.loss"] for name, folder in {**folders, "": partial}.items()}
    members = sum(weight * losses[name] for name, weight in stage.of.items()) / sum(stage.of.values())
    barrier = losses[""] - members
    if barrier > stage.max_barrier:
        shutil.rmtree(partial)
        raise GateError(
            f"stage {stage.name!r}: the average of {', '.join(stage.of)} loses {barrier:.3g} nats a token more on "
            f"{stage.on!r} than they do ({losses['']:.4g}, they {members:.4g}), above max_barrier = "
            f"{stage.max_barrier:g}: they have not learned one thing from one start; merge runs that did"
        )
    metrics = {f"merge.loss.{name}" if name else "merge.loss": value for name, value in losses.items()}
    metrics |= {"merge.barrier": barrier}
    write_json(context.folder / "made.json", metrics)
    partial.rename(context.folder / "artifact")
    return metrics


@torch.no_grad()
def average(folders: Sequence[Path], weights: Sequence[float]) -> tuple[Any, Any]:
    """Model and processor whose every weight is the average of those in `folders`, adapters merged in, summed in
    float64. Raises DataError where two have not the same weights."""
    total, sums = sum(weights), dict[str, torch.Tensor]()
    for folder, weight in zip(folders, weights, strict=True):
        model, processor, _ = open_model(str(folder))
        state = dict(model.named_parameters())
        shapes = {name: value.shape for name, value in state.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise DataError(f"{folder} and {folders[0]} have not the same weights, so there is no average of them")
        for name, value in state.items():
            part = value.double() * (weight / total)
            sums[name] = sums[name] + part if name in sums else part
    for name, value in model.named_parameters():
        value.copy_(sums[name])
    return model, processor
