"""Every system's bridge in a real engine: what it samples has the trainer's log-probs, and a disturbed bridge has not.
One process serves them one after the other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from rlhf import bridge
from rlhf.types import Group, Prompt, Sampling
from tests.unit.systems import SYSTEMS, awake, spec
from tests.unit.test_bridge_build import DENSE, tiny
from tests.unit.test_packing import media

pytestmark = pytest.mark.timeout(240)

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


@pytest.mark.parametrize("name", SYSTEMS)
def test_rollouts_have_the_trainers_log_probs(name: str, engines: Any, tmp_path: Any) -> None:
    torch.set_num_threads(1)
    # vLLM's CPU attention has no kernel for heads of 16
    model, processor = tiny(**spec(name) | {"decoder": DENSE | {"head_dim": 32, "max_position_embeddings": 512}})
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
    assert gap(loaded, processor, groups) >= 100 * max(found, 1e-6)
