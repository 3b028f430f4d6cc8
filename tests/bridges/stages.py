"""The stages of a published bridge's recipe, small: what a stage says it trains has moved, the rest is bit-equal."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlhf import bridge
from rlhf.architecture import base_of
from rlhf.models import bridges_of
from rlhf.recipe import Optimised, Recipe, Sft, Upcycle, load, makes_model
from rlhf.stage import derive
from rlhf.tracking import stage_folder

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "bridges").glob("*.toml"))
DEADLINE = 400.0


def files_of(name: str) -> list[str]:
    """The recipe, and the overlay that makes it small."""
    return [str(ROOT / "recipes" / place) for place in (f"bridges/{name}.toml", "sizes/toy.toml")]


def served(recipe: Recipe) -> tuple[dict[str, dict[str, Any]], Upcycle | None]:
    """The bridge as the last stages have it, and what its decoder became."""
    *_, tables = bridges_of(recipe)
    return tables, next((s.upcycle for s in recipe.stages if isinstance(s, Sft) and s.upcycle is not None), None)


def run(name: str, folder: Path, overrides: list[str]) -> tuple[Recipe, dict[str, Path], Path]:
    """Run the recipe in `folder`; the recipe, the artifact of each stage that makes a model, and the model before."""
    overrides = [*overrides, "tracking.wandb = false"]
    command = [sys.executable, "-m", "rlhf.cli", "run", *files_of(name)]
    done = subprocess.run(
        [*command, *(part for override in overrides for part in ("-o", override))],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recipe, home = load(files_of(name), overrides), folder / "runs" / name
    made = {
        stage.name: stage_folder(home, index, stage.name) / "artifact"
        for index, stage in enumerate(recipe.stages)
        if makes_model(stage)
    }
    return recipe, made, next((home / "model").rglob("model.safetensors")).parent


def check(recipe: Recipe, made: dict[str, Path], first: Path) -> None:
    """Raise AssertionError for a stage that moved what it did not say, or left what it said."""
    for stage in recipe.stages:
        if isinstance(stage, Optimised):
            parent = recipe.parent_of(stage)
            moved, declared = moved_by(stage, recipe, made[parent] if parent else first, made[stage.name])
            assert moved, f"{stage.name} moved nothing"
            assert moved <= declared, f"{stage.name} moved {sorted(moved - declared)[:3]}"
            # a row of the embedding that no text has, and what is too small to move in one step, may stay
            assert len(declared - moved) <= 0.1 * len(declared), f"{stage.name} left {sorted(declared - moved)[:3]}"


def moved_by(stage: Optimised, recipe: Recipe, before: Path, after: Path) -> tuple[set[str], set[str]]:
    """Names of the parameters that a stage has moved, and of those that it says it trains."""
    if stage.lora is not None and not stage.lora.whole:  # adapters beside a base that is not written again
        found = load_file(after / "adapter_model.safetensors")
        ups = {key: bool(value.any()) for key, value in found.items() if ".lora_B." in key}
        return {key for key, moved in ups.items() if moved}, set(ups)
    model, _ = bridge.load(base_of(before))
    seed = derive(recipe.seed, stage.name, "trainer") % 2**31
    if (before / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, before).merge_and_unload()
    if isinstance(stage, Sft) and stage.upcycle is not None:
        model = bridge.upcycle(model, stage.upcycle.num_experts, stage.upcycle.top_k, stage.upcycle.layers, seed)
    if isinstance(stage, Sft) and stage.reset:
        bridge.reset(model, stage.reset, seed)
    old, new = dict(model.named_parameters()), dict(bridge.load(after)[0].named_parameters())
    assert old.keys() == new.keys()
    names = {bridge.short_name(key): key for key in new}
    moved = {short for short, key in names.items() if not torch.equal(old[key], new[key])}
    globs = list(stage.train or ["*"])
    if stage.lora is not None:  # folded into what they adapt
        globs = [*stage.lora.whole, *(f"language_model.layers.*.{name}.weight" for name in stage.lora.target_modules)]
    # a head learns where signals do, or a contrast with it
    idle = () if isinstance(stage, Sft) and (stage.signals or stage.objectives) else ("head.",)
    return moved, {n for n in names if any(fnmatchcase(n, glob) for glob in globs) and not n.startswith(idle)}
