"""Sizes from configurations against the slow obvious oracle: build the model and count."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from rlhf.architecture import (
    DECODER_DEFAULTS,
    VISION_DEFAULTS,
    Architecture,
    architecture_of,
    from_bridge,
    from_folder,
)
from rlhf.bridge import BridgeConfig, BridgeForConditionalGeneration, BridgeMoeForConditionalGeneration
from rlhf.bridge.builder import VISION_TYPES
from rlhf.recipe import Lora, Model

VISION = {
    "siglip": {
        "type": "siglip",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 12,
    },
    "aimv2": {
        "type": "aimv2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 12,
    },
}
DENSE = {
    "type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
MOE = DENSE | {
    "type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "tie_word_embeddings": False,
}
BRIDGES: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"vision": VISION["siglip"], "decoder": DENSE},
    "moe": {"vision": VISION["siglip"], "decoder": MOE},
    "aimv2": {"vision": VISION["aimv2"], "decoder": DENSE},
    "shuffle": {
        "vision": VISION["siglip"],
        "decoder": DENSE,
        "connector": {"type": "mlp", "kind": "pixel_shuffle_mlp"},
    },
    "linear": {"vision": VISION["siglip"], "decoder": DENSE, "connector": {"type": "mlp", "kind": "linear"}},
    "sparse every second layer": {"vision": VISION["siglip"], "decoder": MOE | {"decoder_sparse_step": 2}},
}


def built(bridge: dict[str, dict[str, Any]]) -> BridgeForConditionalGeneration:
    """The real model, without memory for its weights."""
    vision, decoder = dict(bridge["vision"]), dict(bridge["decoder"])
    kind = vision.pop("type") + "_vision_model"
    config = BridgeConfig(
        vision_config=CONFIG_MAPPING[kind](**vision),
        text_config=CONFIG_MAPPING[decoder.pop("type")](**decoder),
        tiler={"type": "single", "size": 48},
        connector=bridge.get("connector"),
        image_token_id=4,
    )
    cls = BridgeMoeForConditionalGeneration if "num_experts" in decoder else BridgeForConditionalGeneration
    with torch.device("meta"):
        model = cls(config)
    model.tie_weights()
    return model


def described(bridge: dict[str, dict[str, Any]]) -> Architecture:
    return from_bridge(bridge | {"tiler": {"type": "single", "size": 48}}, vocab_size=300)


@pytest.mark.parametrize("name", BRIDGES)
def test_parameters(name: str) -> None:
    real = sum(parameter.numel() for parameter in built(BRIDGES[name]).parameters())
    assert described(BRIDGES[name]).parameters == real


def test_upcycled_is_the_moe_of_the_same_width() -> None:
    wide = MOE | {"moe_intermediate_size": DENSE["intermediate_size"], "tie_word_embeddings": True}
    assert (
        described(BRIDGES["dense"]).upcycled(4, 2).parameters
        == described({"vision": VISION["siglip"], "decoder": wide}).parameters
    )


@pytest.mark.parametrize("kind", [*VISION_DEFAULTS, *DECODER_DEFAULTS])
def test_defaults_are_those_of_transformers(kind: str) -> None:
    known = VISION_DEFAULTS.get(kind) or DECODER_DEFAULTS[kind]
    config = CONFIG_MAPPING[VISION_TYPES.get(kind, kind)]()
    assert {key: getattr(config, key) for key in known} == known


def test_image_tokens_are_the_geometrys() -> None:
    assert described(BRIDGES["dense"]).image_tokens == 16
    assert described(BRIDGES["shuffle"]).image_tokens == 4


def test_folder_of_safetensors(tmp_path: Path) -> None:
    tensors = {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, "__metadata__": {"format": "pt"}}
    header = json.dumps(tensors).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(48))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SomeVLM"], "text_config": {"num_experts": 8}}))
    found = from_folder(tmp_path)
    assert (found.name, found.parameters, found.experts) == ("SomeVLM", 12, (8, 1))
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        from_folder(tmp_path)


def test_a_saved_bridge_is_the_architecture_it_was_built_from(tmp_path: Path) -> None:
    built(BRIDGES["moe"]).config.save_pretrained(tmp_path)
    found = architecture_of(Model(path=str(tmp_path)))
    assert found.is_bridge
    assert found.experts == (4, 2)
    assert found.parameters == described(BRIDGES["moe"]).parameters


def test_hub_names_are_unknown_not_guessed() -> None:
    found = architecture_of(Model(path="org/model"))
    assert (found.known, found.parameters, found.experts, found.image_tokens) == (False, None, None, None)


def test_lora_parameters() -> None:
    q, o = (48 + 64) * 4, (64 + 48) * 4  # rank × (in + out)
    assert described(BRIDGES["dense"]).lora_parameters(Lora(rank=4, target_modules=["q_proj", "o_proj"])) == 3 * (q + o)
