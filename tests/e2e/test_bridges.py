"""Bridges in a real engine and in real stages: one of each serving class here, all with `make bridges`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.recipe import Rebuild, Sft, Upcycle, load
from tests.bridges import parity, stages

pytestmark = pytest.mark.timeout(240)

# placeholders alone; with the question; a mixture of experts; layers of the decoder's own; by the whole row
NAMES = ["llava_uhd", "instructblip", "moe_llava", "cogvlm", "flamingo", "lavin", "blip2_t5"]


@pytest.fixture(scope="module")
def ask() -> Iterator[parity.Ask]:
    with parity.engines() as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_have_the_trainers_log_probs(name: str, ask: parity.Ask, tmp_path: Path) -> None:
    found = parity.measure(*stages.served(load(stages.files_of(name))), ask, tmp_path)
    assert found.holds, found


@pytest.mark.parametrize("name", ["cogvlm", "flamingo", "lavin"])
def test_decoders_with_layers_of_their_own_may_have_experts(name: str, ask: parity.Ask, tmp_path: Path) -> None:
    tables, _ = stages.served(load(stages.files_of(name)))
    found = parity.measure(tables, Upcycle(num_experts=4, top_k=2, layers="every_second"), ask, tmp_path)
    assert found.holds, found


def test_a_stage_moves_what_it_declares_and_nothing_else(tmp_path: Path) -> None:
    """The supervised stages of a recipe whose pictures grow on the way."""
    recipe = load(stages.files_of("qwen_vl"))
    removed = [f"stages.{s.name} = {{ remove = true }}" for s in recipe.stages if not isinstance(s, Sft | Rebuild)]
    stages.check(*stages.run("qwen_vl", tmp_path, [*removed, "stages.think-fusion.start = 'long-cot'"]))
