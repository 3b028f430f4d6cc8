"""Every system's bridge in a real engine: what it samples has the trainer's log-probs, and a disturbed bridge has not.
One process serves them one after the other."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlhf import bridge
from rlhf.architecture import base_of
from rlhf.recipe import Rebuild, Recipe, Sft, load
from rlhf.stage import derive
from rlhf.types import Group, Prompt, Sampling
from tests.unit.systems import SYSTEMS, awake, spec
from tests.unit.test_bridge_build import tiny
from tests.unit.test_packing import media

pytestmark = pytest.mark.timeout(240)

# one of each serving class; all of them with `make bridges`
NAMES = list(SYSTEMS) if os.environ.get("BRIDGES") == "all" else ["llava_uhd", "instructblip"]
ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "bridges").glob("*.toml"))
TRAINED = RECIPES if os.environ.get("BRIDGES") == "all" else ["llava_uhd"]
MASKED = (0, 2)  # padding and the placeholder
DEADLINE = 120.0
# one picture, several of uneven sizes, none
SHOWN: list[list[tuple[int, int]]] = [[(40, 24)], [(9, 50), (33, 33)], [], [(64, 30)], [(16, 16), (5, 5), (30, 8)]]


def prompts(image_token: int) -> list[Prompt]:
    made = []
    for index, shown in enumerate(SHOWN):
        ids = [token for place in range(len(shown)) for token in (20 + place, image_token)] + [30 + index, 31, 32]
        pictures = tuple(
            replace(media(10 * index + place, *size), question=(50 + index, 60 + place, 70))
            for place, size in enumerate(shown)
        )
        made.append(Prompt(f"toy/{index}", "toy", "?", tuple(ids), pictures))
    return made


def serve(pipe: Connection) -> None:
    """For every folder asked for, start an engine, answer (error, groups), and close it."""
    from actors.rollout import EngineSettings, RolloutWorker

    pipe.send((None, None))
    while (asked := pipe.recv()) is not None:
        folder, given, sampling = asked
        try:
            settings = EngineSettings(max_model_len=512, masked_tokens=MASKED, deadline=DEADLINE)
            worker = RolloutWorker(folder, settings)
            try:
                pipe.send((None, worker.generate(given, sampling)))
            finally:
                worker.close()
        except Exception as error:  # noqa: BLE001 - the asking test raises it
            pipe.send((f"{type(error).__name__}: {error}", None))


@pytest.fixture(scope="module")
def engines() -> Iterator[Any]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()

    def answer() -> Any:
        if not ours.poll(DEADLINE):
            raise TimeoutError("the engine's process does not answer")
        error, result = ours.recv()
        assert error is None, error
        return result

    answer()

    def ask(*asked: Any) -> Any:
        ours.send(asked)
        return answer()

    yield ask
    ours.send(None)
    process.join(timeout=30)
    process.kill()


def gap(model: Any, processor: Any, groups: list[Group]) -> float:
    """The largest |trainer − engine| log-prob difference of a sampled token."""
    found = []
    for group in groups:
        shown = processor.image_inputs([one.open() for one in group.prompt.media]) if group.prompt.media else {}
        for rollout in group.rollouts:
            ids, length = torch.tensor([[*group.prompt_ids, *rollout.token_ids]]), len(rollout.token_ids)
            with torch.no_grad():
                logits = model(input_ids=ids, **shown, use_cache=False).logits[0].float()
            logits[:, list(MASKED)] = float("-inf")
            chosen = torch.tensor(rollout.token_ids)[:, None]
            values = logits.log_softmax(-1)[-length - 1 : -1].gather(-1, chosen)[:, 0]
            found.extend((values - torch.tensor(rollout.logprobs)).abs().tolist())
    return float(np.max(found))


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_have_the_trainers_log_probs(name: str, engines: Any, tmp_path: Any) -> None:
    torch.set_num_threads(1)
    # vLLM's CPU attention has no kernel for heads of 16
    given = spec(name)
    decoder = given["decoder"] | {"max_position_embeddings": 512}
    model, processor = tiny(**given | {"decoder": decoder | ({"head_dim": 32} if "head_dim" in decoder else {})})
    awake(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    given = prompts(processor.image_token_id)
    groups = engines(str(tmp_path), given, Sampling(num=2, max_tokens=12, seed=3))
    for group, prompt in zip(groups, given, strict=True):
        assert list(group.prompt_ids) == processor.expand(prompt.token_ids, [one.size for one in prompt.media])
    loaded, _ = bridge.load(tmp_path)
    found = gap(loaded, processor, groups)
    assert found <= 1e-4
    with torch.no_grad():  # the control
        for parameter in loaded.model.connector.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    control = gap(loaded, processor, groups)
    print(f"{name}: {found:.1e}, disturbed {control:.2f}")
    assert control >= 100 * max(found, 1e-6)


@pytest.mark.parametrize("name", TRAINED)
def test_a_stage_moves_what_it_declares_and_nothing_else(name: str, tmp_path: Path) -> None:
    """The supervised stages of a recipe, small: what a stage's globs name has moved, the rest is bit-equal."""
    files = [str(ROOT / "recipes" / place) for place in (f"bridges/{name}.toml", "sizes/toy.toml")]
    recipe = load(files)
    kept = [stage for stage in recipe.stages if isinstance(stage, Sft | Rebuild)]
    removed = [f"stages.{stage.name} = {{ remove = true }}" for stage in recipe.stages if stage not in kept]
    overrides = [*removed, "stages.think-fusion.start = 'long-cot'", "tracking.wandb = false"]
    command = [sys.executable, "-m", "rlhf.cli", "run", *files]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *(part for override in overrides for part in ("-o", override))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run, recipe = tmp_path / "runs" / name, load(files, overrides)
    made = {stage.name: next(run.glob(f"stages/*-{stage.name}/artifact")) for stage in recipe.stages}
    first = next((run / "model").rglob("model.safetensors")).parent
    for stage in recipe.stages:
        if isinstance(stage, Sft):
            parent = recipe.parent_of(stage)
            moved, declared = moved_by(stage, recipe, made[parent] if parent else first, made[stage.name])
            assert moved, stage.name
            assert moved <= declared, stage.name
            # a row of the embedding that no text has, and what is too small to move in one step, may stay
            assert len(declared - moved) <= 0.1 * len(declared), (stage.name, sorted(declared - moved))


def moved_by(stage: Sft, recipe: Recipe, before: Path, after: Path) -> tuple[set[str], set[str]]:
    """Names of the parameters that a stage has moved, and of those that it says it trains."""
    if stage.lora is not None:  # adapters beside a base that is not written again
        found = load_file(after / "adapter_model.safetensors")
        ups = {key: bool(value.any()) for key, value in found.items() if ".lora_B." in key}
        return {key for key, moved in ups.items() if moved}, set(ups)
    model, _ = bridge.load(base_of(before))
    seed = derive(recipe.seed, stage.name, "trainer") % 2**31
    if (before / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, before).merge_and_unload()
    if stage.upcycle is not None:
        model = bridge.upcycle(model, stage.upcycle.num_experts, stage.upcycle.top_k, stage.upcycle.layers, seed)
    if stage.reset:
        bridge.reset(model, stage.reset, seed)
    old, new = dict(model.named_parameters()), dict(bridge.load(after)[0].named_parameters())
    assert old.keys() == new.keys()
    names = {bridge.short_name(key): key for key in new}
    moved = {short for short, key in names.items() if not torch.equal(old[key], new[key])}
    globs = stage.train or {"*": stage.lr}
    return moved, {short for short in names if any(fnmatchcase(short, glob) for glob in globs)}
