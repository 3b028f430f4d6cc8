"""Bytes of training and serving against DeepSpeed's own estimators, and against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import CONFIG_MAPPING

from rlhf.architecture import from_bridge
from rlhf.bridge import BridgeConfig, BridgeForConditionalGeneration, BridgeMoeForConditionalGeneration
from rlhf.foreign import loop_over_experts
from rlhf.memory import (
    CAPTION,
    LOGITS,
    Serving,
    Sharding,
    gathered_bytes,
    gradient_bytes,
    kept_bytes,
    optimizer_bytes,
    row_bytes,
    served_bytes,
    weight_bytes,
    width_of,
    working_bytes,
)

BILLIONS = 8_000_000_000


def held(parameters: int, trainable: int, over: Sharding) -> int:
    """Of one rank, on its GPU: weights, gradients and optimizer state."""
    moved = 0 if over.offload else gradient_bytes(trainable, over) + optimizer_bytes(trainable, over)
    return weight_bytes(parameters, over) + moved


def test_training_state_by_zero_stage() -> None:
    n = 1000

    def of(stage: int, precision: str = "float32", ranks: int = 2, trained: int = n) -> int:
        return held(n, trained, Sharding(precision, stage, ranks))

    assert of(0) == 4 * n + 4 * n + 8 * n  # weights, gradients, two moments
    assert of(1) == 4 * n + 4 * n + (4 + 12) * n // 2  # its partition's gradients and master copy as well
    assert of(2) == 4 * n + (8 + 12) * n // 2
    assert of(3) == (4 + 4 + 8) * n // 2  # the partition is the master copy
    assert of(1, "bfloat16") == 2 * n + 6 * n + (4 + 12) * n // 2  # gradients add up in float32 beside their own
    assert of(3, "bfloat16", ranks=1) == 18 * n
    assert of(2, ranks=1, trained=0) == 4 * n
    muon = optimizer_bytes(n, Sharding("float32", 0, 1), matrices=900)
    assert muon == 8 * 100 + 4 * 900


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("offload", [False, True])
def test_states_on_a_gpu_are_what_deepspeed_estimates(offload: bool, nodes: int) -> None:
    """Its estimators are for half precision; those of ZeRO-3 add a gathered layer, where we count what may be gathered
    at most."""
    sizes = {"num_gpus_per_node": 8, "num_nodes": nodes, "cpu_offload": offload}
    _, expected = estimate_zero2_model_states_mem_needs(BILLIONS, **sizes)
    assert held(BILLIONS, BILLIONS, Sharding("bfloat16", 2, 8 * nodes, offload)) == pytest.approx(expected, rel=1e-6)
    third = Sharding("bfloat16", 3, 8 * nodes, offload)
    _, expected, layer = estimate_zero3_model_states_mem_needs(BILLIONS, 10**8, cpu_offload_params=False, **sizes)
    assert held(BILLIONS, BILLIONS, third) == pytest.approx(expected - layer, rel=1e-6)
    assert gathered_bytes(BILLIONS, third) == 2 * 10**9 > layer


@pytest.mark.parametrize("stage", [2, 3])
def test_states_on_the_host_are_what_deepspeed_estimates(stage: int) -> None:
    """Of all ranks together, without its factor for buffers."""
    over = Sharding("bfloat16", stage, 8, offload=True)
    sizes = {"num_gpus_per_node": 8, "cpu_offload": True, "additional_buffer_factor": 1.0}
    if stage == 2:
        expected, _ = estimate_zero2_model_states_mem_needs(BILLIONS, **sizes)
    else:
        expected, *_ = estimate_zero3_model_states_mem_needs(BILLIONS, 10**8, cpu_offload_params=False, **sizes)
        assert expected == BILLIONS * 16
    states = 8 * (over.split(4 * BILLIONS, 1) + optimizer_bytes(BILLIONS, over))
    opened = 8 * 4 * BILLIONS  # every rank opens the model whole, in float32
    assert max(states, opened if stage == 2 else 0) == pytest.approx(expected, rel=1e-6)


VISION = {
    "siglip": {"type": "siglip", "intermediate_size": 256},
    "clip": {"type": "clip", "intermediate_size": 256},
    "aimv2": {"type": "aimv2", "intermediate_size": 352},
}
SHARED = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 48, "patch_size": 12}
DENSE: dict[str, Any] = {
    "type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
MOE = DENSE | {"type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
PICTURES = 48


def kept(vision: str, decoder: dict[str, Any], precision: str, checkpointing: bool, encodes: bool) -> tuple[int, int]:
    """(what autograd keeps of a forward without its logits, what we say of it), bytes."""
    tables = {"vision": VISION[vision] | SHARED, "decoder": dict(decoder), "tiler": {"type": "single", "size": 48}}
    architecture = from_bridge(tables, 300)
    sizes = {slot: {k: v for k, v in tables[slot].items() if k != "type"} for slot in ("vision", "decoder")}
    config = BridgeConfig(
        vision_config=CONFIG_MAPPING[f"{vision}_vision_model"](**sizes["vision"]),
        text_config=CONFIG_MAPPING[decoder["type"]](**sizes["decoder"]),
        tiler=tables["tiler"],
        image_token_id=4,
    )
    kind = BridgeMoeForConditionalGeneration if decoder is MOE else BridgeForConditionalGeneration
    model = kind(config).train()
    loop_over_experts(model)
    model = model.to(torch.bfloat16) if precision == "bfloat16" else model
    model.model.vision.requires_grad_(encodes)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    length = (architecture.image_tokens or 0) + CAPTION
    ids = torch.full((PICTURES, length), 10)
    ids[:, : architecture.image_tokens] = 4
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model.model(input_ids=ids, pixel_values=torch.rand(PICTURES, 3, 48, 48), use_cache=False)
    assert out.last_hidden_state.requires_grad
    tokens = PICTURES * length
    logits = (width_of(precision) + 16) * min(tokens * 300, LOGITS)
    said = kept_bytes(architecture, tokens, precision, checkpointing, encodes) - logits
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()), said


@pytest.mark.parametrize(
    ("vision", "decoder", "precision", "encodes"),
    [
        ("siglip", DENSE, "float32", True),
        ("clip", DENSE, "float32", True),
        ("aimv2", DENSE, "float32", True),
        ("aimv2", DENSE, "bfloat16", True),
        ("siglip", DENSE, "float32", False),
        ("siglip", MOE, "float32", False),
        ("siglip", MOE, "bfloat16", False),
    ],
)
def test_activations_are_those_autograd_keeps(
    vision: str, decoder: dict[str, Any], precision: str, encodes: bool
) -> None:
    measured, said = kept(vision, decoder, precision, False, encodes)
    assert measured <= said <= 1.4 * measured


@pytest.mark.parametrize("encodes", [False, True])
def test_checkpointing_keeps_the_input_of_each_layer_and_the_whole_of_one(encodes: bool) -> None:
    inputs, said = kept("siglip", DENSE, "float32", True, encodes)
    everything, _ = kept("siglip", DENSE, "float32", False, encodes)
    assert inputs + everything / 10 <= said  # of ten layers one; the largest is more than that
    assert said <= 1.4 * (inputs + everything / 6)


def test_logits_are_never_all_there() -> None:
    """A part of rows at a time goes through the head: 20,480 tokens of 151,936 words would be 12 GB in float32."""
    tables = {"vision": VISION["siglip"] | SHARED, "tiler": {"type": "single", "size": 48}}
    few = from_bridge(tables | {"decoder": DENSE}, 300)
    many = from_bridge(tables | {"decoder": DENSE | {"vocab_size": 151_936}}, 300)
    sizes = (20_480, "float32", True, False)
    assert kept_bytes(many, *sizes) - kept_bytes(few, *sizes) == 20 * (LOGITS - 20_480 * 300)


def test_an_engine_splits_its_decoder_and_its_heads() -> None:
    tables = {"vision": VISION["siglip"] | SHARED, "decoder": DENSE, "tiler": {"type": "single", "size": 48}}
    architecture = from_bridge(tables, 300)
    assert architecture.parts is not None
    assert architecture.parameters is not None
    decoder = architecture.parts["decoder"]
    one, two, four = (Serving("float32", ways, 1000, 8) for ways in (1, 2, 4))
    assert served_bytes(architecture, one) == 4 * architecture.parameters
    assert served_bytes(architecture, two) == 4 * (architecture.parameters - decoder // 2)
    row = 2 * 6 * 2 * 32 * 4 * 1024  # keys and values, layers, heads, width, float32, whole blocks of tokens
    assert [row_bytes(architecture, over) for over in (one, two, four)] == [row, row // 2, row // 2]
    assert row_bytes(architecture, Serving("bfloat16", 1, 1000, 8)) == row // 2
    more = Serving("float32", 1, 1000, 16)
    assert working_bytes(architecture, more) - working_bytes(architecture, one) == 12 * 8 * 300
