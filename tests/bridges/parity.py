"""A bridge in a real engine: what it samples has the trainer's log-probs, and a disturbed bridge has not. One process
serves bridges one after the other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf import bridge
from rlhf.models import marks_of, masked_ids
from rlhf.recipe import Upcycle
from rlhf.types import Group, Prompt, Sampling
from tests.unit.systems import awake
from tests.unit.test_bridge_build import tiny
from tests.unit.test_packing import media

DEADLINE = 120.0
# one picture, several of uneven sizes, none
SHOWN: list[list[tuple[int, int]]] = [[(40, 24)], [(9, 50), (33, 33)], [], [(64, 30)], [(16, 16), (5, 5), (30, 8)]]
Ask = Callable[[str, list[Prompt], Sampling, tuple[int, ...]], list[Group]]


@dataclass(frozen=True)
class Parity:
    """The largest |trainer − engine| log-prob difference of a sampled token, in nats: of the bridge, and of one whose
    connector was disturbed in the trainer alone."""

    gap: float
    control: float

    @property
    def holds(self) -> bool:
        return self.gap <= 1e-4 and self.control >= 100 * max(self.gap, 1e-6)


def prompts(image_token: int, ends: Sequence[int] = ()) -> list[Prompt]:
    """`ends`: what every prompt ends with."""
    made = []
    for index, shown in enumerate(SHOWN):
        ids = [token for place in range(len(shown)) for token in (20 + place, image_token)] + [
            30 + index,
            31,
            32,
            *ends,
        ]
        pictures = tuple(
            replace(media(10 * index + place, *size), question=(50 + index, 60 + place, 70))
            for place, size in enumerate(shown)
        )
        made.append(Prompt(f"toy/{index}", "toy", "?", tuple(ids), pictures))
    return made


def serve(pipe: Connection) -> None:
    """For every folder asked for, start the engine that serves it, answer (error, groups), and close it."""
    from actors.huggingface import HuggingFaceWorker
    from actors.rollout import EngineSettings, RolloutWorker
    from actors.vllm_worker import VllmWorker
    from rlhf.architecture import from_folder

    pipe.send((None, None))
    while (asked := pipe.recv()) is not None:
        folder, given, sampling, masked = asked
        try:
            settings = EngineSettings(max_model_len=512, masked_tokens=masked, deadline=DEADLINE)
            vllm = from_folder(Path(folder)).served == "vllm"
            worker: RolloutWorker = (VllmWorker if vllm else HuggingFaceWorker)(folder, settings)
            try:
                pipe.send((None, worker.generate(given, sampling)))
            finally:
                worker.close()
        except Exception as error:  # noqa: BLE001 - whoever asks raises it
            pipe.send((f"{type(error).__name__}: {error}", None))


@contextmanager
def engines() -> Iterator[Ask]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()

    def answer() -> Any:
        if not ours.poll(DEADLINE):
            raise TimeoutError("the engine's process does not answer")
        error, result = ours.recv()
        assert error is None, error
        return result

    def ask(*asked: Any) -> list[Group]:
        ours.send(asked)
        found: list[Group] = answer()
        return found

    answer()
    try:
        yield ask
        ours.send(None)
        process.join(timeout=30)
    finally:
        process.kill()


def difference(
    model: Any, processor: Any, groups: Sequence[Group], masked: Sequence[int], temperature: float = 1.0
) -> float:
    found = []
    for group in groups:
        shown = processor.image_inputs([one.open() for one in group.prompt.media]) if group.prompt.media else {}
        for rollout in group.rollouts:
            ids, length = torch.tensor([[*group.prompt_ids, *rollout.token_ids]]), len(rollout.token_ids)
            with torch.no_grad():
                logits = model(input_ids=ids, **shown, use_cache=False).logits[0].float() / temperature
            logits[:, list(masked)] = float("-inf")
            chosen = torch.tensor(rollout.token_ids)[:, None]
            values = logits.log_softmax(-1)[-length - 1 : -1].gather(-1, chosen)[:, 0]
            found.extend((values - torch.tensor(rollout.logprobs)).abs().tolist())
    return float(np.max(found))


def measure(tables: Mapping[str, Any], upcycle: Upcycle | None, ask: Ask, folder: Path) -> Parity:
    """Build the bridge, its weights loud enough to be heard, and let an engine sample from it."""
    torch.set_num_threads(1)
    model, processor = tiny(marks=marks_of(tables), **tables)
    awake(model)
    if upcycle is not None:
        model = bridge.upcycle(model, upcycle.num_experts, upcycle.top_k, upcycle.layers, 1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    mark = model.config.reply_token_id
    given, masked = prompts(processor.image_token_id, [] if mark is None else [mark]), masked_ids(processor)
    groups = ask(str(folder), given, Sampling(num=2, max_tokens=12, seed=3), masked)
    for group, prompt in zip(groups, given, strict=True):
        assert list(group.prompt_ids) == processor.expand(prompt.token_ids, [one.size for one in prompt.media])
    loaded, _ = bridge.load(folder)
    gap = difference(loaded, processor, groups, masked)
    with torch.no_grad():
        for parameter in loaded.model.connector.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return Parity(gap, difference(loaded, processor, groups, masked))
