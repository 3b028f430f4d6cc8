"""Another bridge from a trained one: other settings, parts of other models, and every weight that still has a place."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import interpolate
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PretrainedConfig

from rlhf.bridge.builder import VISION_TYPES, config_of, load, new, with_ids
from rlhf.bridge.config import BridgeConfig
from rlhf.bridge.decoders import DECODERS, PREFIX, own, type_of
from rlhf.bridge.heads import HEADS
from rlhf.bridge.layers.told import ToldModel
from rlhf.bridge.model import BridgeForConditionalGeneration
from rlhf.bridge.naming import MODEL_TYPE, short_name
from rlhf.bridge.packers import PACKERS
from rlhf.bridge.processor import BridgeImageProcessor, BridgeProcessor
from rlhf.recipe import Slot
from rlhf.slots import laid_over

PARTS = {
    "vision": ("model.vision.",),
    "connector": ("model.connector.",),
    "packer": ("model.packer.",),
    "decoder": ("model.language_model.", "lm_head."),
}
POSITIONS = "embeddings.position_embedding.weight"
Weights = dict[str, torch.Tensor]


@torch.no_grad()
def rebuild(
    model: BridgeForConditionalGeneration,
    processor: BridgeProcessor,
    tables: Mapping[str, Mapping[str, Any]],
    parts: Mapping[Slot, tuple[Path, Slot]],
    seed: int,
) -> tuple[BridgeForConditionalGeneration, BridgeProcessor, dict[str, int]]:
    """A bridge with `tables` laid over those of `model`, and how many parameters were kept, resized (a table of
    positions), taken from `parts`, begun afresh and left behind.

    A parameter is kept where the new bridge has one of its name and shape. `parts` maps a slot (vision, connector,
    packer, decoder) to a folder and the part of it: of a bridge, or a vision encoder or language model of transformers.
    Raises `ValueError` where a part does not fit.
    """
    config = _config(model.config, tables, processor)
    fresh = new(config, seed)
    fresh.to(model.dtype)
    old, target = dict(model.named_parameters()), dict(fresh.named_parameters())  # tied ones once
    found: dict[str, Weights] = {"kept": {}, "resized": {}, "taken": {}}
    for name, value in target.items():
        before = old.get(name)
        if before is not None and before.shape == value.shape:
            found["kept"][name] = before
        elif before is not None and name.endswith(POSITIONS) and before.shape[1] == value.shape[1]:
            found["resized"][name] = resized(before, model.config.vision_config, config.vision_config)
    begun = target.keys() - found["kept"].keys() - found["resized"].keys()
    for slot, (folder, part) in parts.items():
        found["taken"] |= _part(slot, folder, part, fresh, begun)
    for weights in found.values():
        for name, value in weights.items():
            target[name].copy_(value)
    begun -= found["taken"].keys()
    decoder = fresh.model.language_model
    if isinstance(decoder, ToldModel) and any(".language_model." in name for name in begun):
        decoder.begin()
    counts = {how: sum(value.numel() for value in weights.values()) for how, weights in found.items()}
    counts["fresh"] = sum(target[name].numel() for name in begun)
    counts["left"] = sum(value.numel() for name, value in old.items() if name not in target)
    made = BridgeProcessor(BridgeImageProcessor(config.geometry.to_dict()), processor.tokenizer)
    fresh.generation_config = model.generation_config
    return fresh.train(model.training), made, counts


def _config(old: BridgeConfig, tables: Mapping[str, Mapping[str, Any]], processor: BridgeProcessor) -> BridgeConfig:
    settings: dict[str, Any] = {
        "vision_config": old.vision_config,
        "text_config": old.text_config,
        "image_token_id": old.image_token_id,
        "pad_token_id": old.pad_token_id,
        "eos_token_id": old.eos_token_id,
    }
    for slot in ("tiler", "encoder", "connector", "packer"):
        table = laid_over(getattr(old, slot), tables.get(slot, {}))
        settings[slot] = with_ids(PACKERS, table, processor.tokenizer) if slot == "packer" else table
    if (head := laid_over(old.head or {}, tables.get("head", {}))) != {}:
        settings["head"] = with_ids(HEADS, head, processor.tokenizer)
    if "vision" in tables:
        kind = old.vision_config.model_type.removesuffix("_vision_model")
        given = {"type": kind, **tables["vision"]}
        settings["vision_config"] = _changed("vision", old.vision_config, VISION_TYPES[given.pop("type")], given)
    if "decoder" in tables:
        given = {"type": type_of(old.text_config.model_type), **tables["decoder"]}
        kind = given.pop("type")
        settings["text_config"] = _changed(
            "decoder", old.text_config, PREFIX * (kind in DECODERS.types()) + kind, given
        )
    return BridgeConfig(**settings)


def _changed(slot: str, old: PretrainedConfig, model_type: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """The config with other values; where its type changes too, one of that type with what both have."""
    config_of(slot, model_type, given)  # refuses keys that it does not have
    cls = CONFIG_MAPPING[model_type]
    fields = old.to_dict()
    decoder = own({**fields, "type": type_of(old.model_type)})
    if decoder is not None and model_type != old.model_type:
        fields = decoder.plain(fields)
    known = {field.name for field in dataclasses.fields(cls)}
    # layer types are those of as many layers as there were
    kept = {key: value for key, value in fields.items() if key in known and key not in ("model_type", "layer_types")}
    return cls(**{**kept, **given})


def resized(table: torch.Tensor, old: PretrainedConfig, config: PretrainedConfig) -> torch.Tensor:
    """A table of positions [class tokens + rows x columns, width] for pictures of another size: bicubic, as
    transformers interpolates it while it runs."""

    def grid(of: PretrainedConfig) -> tuple[int, int]:
        sides = [(value, value) if isinstance(value, int) else tuple(value) for value in (of.image_size, of.patch_size)]
        return sides[0][0] // sides[1][0], sides[0][1] // sides[1][1]

    before, after = grid(old), grid(config)
    first = len(table) - math.prod(before)
    plane = table[first:].reshape(1, *before, -1).permute(0, 3, 1, 2)
    wider = interpolate(plane.float(), size=after, mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat((table[:first], wider.permute(0, 2, 3, 1).flatten(0, 2)))


def _part(slot: str, folder: Path, part: str, model: BridgeForConditionalGeneration, begun: set[str]) -> Weights:
    """The weights of a slot, under the model's names. What only this model has may be missing if it begins afresh."""
    found = _weights(slot, folder, part)
    wanted = {name: value for name, value in model.named_parameters() if name.startswith(PARTS[slot])}
    taken: Weights = {}
    for name, value in wanted.items():
        if name not in found:
            if name in begun and slot in ("decoder", "vision") and _added(name):
                continue
            raise ValueError(f"parts.{slot}: {folder} has no {short_name(name)!r}; is it of the same kind?")
        if name.endswith(POSITIONS) and found[name].shape != value.shape:
            config = model.config.vision_config
            taken[name] = resized(found[name], _pictures(folder, config), config)
        elif found[name].shape != value.shape:
            raise ValueError(
                f"parts.{slot}: {short_name(name)!r} is {list(found[name].shape)} in {folder} and {list(value.shape)} "
                f"here; give model.bridge the sizes of that {slot}"
                + (", and its tokenizer" if "embed" in name or "lm_head" in name else "")
            )
        else:
            taken[name] = found[name]
    return taken


def _added(name: str) -> bool:
    """Whether a parameter is one of those that adaptations add to published models."""
    return any(mark in name for mark in (".vision_", ".gated.", "adapter", ".window_"))


def _weights(slot: str, folder: Path, part: str) -> Weights:
    """Of `part` of the model in `folder`, under the names a bridge has for `slot`."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"parts.{slot}: {folder} holds LoRA adapters; take their base, or merge them into it with peft"
        )
    if json.loads((folder / "config.json").read_text()).get("model_type") == MODEL_TYPE:
        state = load(folder)[0].state_dict()
        return {
            target + name.removeprefix(source): value
            for source, target in zip(PARTS[part], PARTS[slot], strict=True)
            for name, value in state.items()
            if name.startswith(source)
        }
    if slot == "vision":
        whole = AutoModel.from_pretrained(folder)
        state = getattr(whole, "vision_model", whole).state_dict()
        return {f"model.vision.tower.{name}": value for name, value in state.items()}
    if slot == "decoder":
        state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        return {
            ("model.language_model." + name.removeprefix("model.")) if name.startswith("model.") else name: value
            for name, value in state.items()
        }
    raise ValueError(f"parts.{slot}: {folder} holds no bridge, and a {slot} is a part of bridges only")


def _pictures(folder: Path, like: PretrainedConfig) -> PretrainedConfig:
    """What says how large the pictures of a vision encoder are."""
    fields = json.loads((folder / "config.json").read_text())
    fields = fields.get("vision_config", fields)
    return cast(
        PretrainedConfig,
        type(like)(
            image_size=fields.get("image_size", like.image_size), patch_size=fields.get("patch_size", like.patch_size)
        ),
    )
