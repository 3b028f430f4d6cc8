"""Another bridge from a trained one: other settings, parts of other models, and every weight that still has a place."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import interpolate
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from rlhf.architecture import base_of
from rlhf.bridge.builder import VISION_TYPES, begin, config_of, named_in, new, processor_of, with_ids
from rlhf.bridge.config import BridgeConfig
from rlhf.bridge.decoders import DECODERS, PREFIX, own, type_of
from rlhf.bridge.heads import HEADS
from rlhf.bridge.model import BridgeForConditionalGeneration
from rlhf.bridge.naming import MODEL_TYPE, short_name
from rlhf.bridge.packers import PACKERS
from rlhf.bridge.processor import BridgeProcessor
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
    parts: Mapping[Slot, Path],
    seed: int,
) -> tuple[BridgeForConditionalGeneration, BridgeProcessor, dict[str, int]]:
    """A bridge with `tables` laid over those of `model`, and how many parameters were kept, resized (a table of
    positions), taken from `parts`, begun afresh and left behind.

    A parameter is kept where the new bridge has one of its name and shape. `parts` maps a slot (vision, connector,
    packer, decoder) to the folder it is taken from: of a bridge, or of a vision encoder or language model of
    transformers, beside which what the bridge adds to it begins afresh.
    Raises `ValueError` where a part does not fit.
    """
    config, made = rebuilt(model.config, tables, processor)
    fresh = new(config, seed)
    fresh.to(model.dtype)
    old, target = dict(model.named_parameters()), dict(fresh.named_parameters())  # tied ones once
    found: dict[str, Weights] = {"kept": {}, "resized": {}, "taken": {}}
    for name, value in target.items():
        before = old.get(name)
        if before is not None and before.shape == value.shape:
            found["kept"][name] = before
        elif before is not None and name.endswith(POSITIONS) and before.shape[1] == value.shape[1]:
            table = resized(before, model.config.vision_config, config.vision_config)
            if table.shape == value.shape:  # else one of the two has a class token
                found["resized"][name] = table
    begun = target.keys() - found["kept"].keys() - found["resized"].keys()
    for slot, folder in parts.items():
        taken = _part(slot, folder, fresh)
        found["taken"] |= taken
        # what a published part has none of begins beside it, whatever this model had
        added = {name for name in target if name.startswith(PARTS[slot]) and name not in taken}
        begun |= added
        for weights in (found["kept"], found["resized"]):
            for name in added | taken.keys():
                weights.pop(name, None)
    for weights in found.values():
        for name, value in weights.items():
            target[name].copy_(value)
    begun -= found["taken"].keys()
    begin(fresh, begun)
    counts = {how: sum(value.numel() for value in weights.values()) for how, weights in found.items()}
    counts["fresh"] = sum(target[name].numel() for name in begun)
    counts["left"] = sum(value.numel() for name, value in old.items() if name not in target)
    fresh.generation_config = model.generation_config
    return fresh.train(model.training), made, counts


def rebuilt(
    old: BridgeConfig, tables: Mapping[str, Mapping[str, Any]], processor: BridgeProcessor
) -> tuple[BridgeConfig, BridgeProcessor]:
    """Config and processor with `tables` laid over the config's own. Raises `ValueError` for a key or token that it
    cannot have."""
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
    if head := laid_over(old.head or {}, tables.get("head", {})):
        settings["head"] = with_ids(HEADS, head, processor.tokenizer)
    if "vision" in tables:
        kind = next(name for name, of in VISION_TYPES.items() if of == old.vision_config.model_type)
        given = {"type": kind, **tables["vision"]}
        settings["vision_config"] = _changed("vision", old.vision_config, VISION_TYPES[given.pop("type")], given)
    if "decoder" in tables:
        given = {"type": type_of(old.text_config.model_type), **tables["decoder"]}
        kind = given.pop("type")
        if kind in DECODERS.types() and kind != type_of(old.text_config.model_type):
            given = named_in(kind, given, processor.tokenizer)
        settings["text_config"] = _changed(
            "decoder", old.text_config, PREFIX * (kind in DECODERS.types()) + kind, given
        )
    config = BridgeConfig(**settings)
    return config, processor_of(config, processor.tokenizer)


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
    if "rope_theta" in given and kept.get("rope_parameters"):  # which holds the old one
        kept["rope_parameters"] = {**kept["rope_parameters"], "rope_theta": given["rope_theta"]}
    inherited = (
        DECODERS.find({"type": kind}).of_plain(fields) if (kind := type_of(model_type)) in DECODERS.types() else {}
    )
    return cls(**{**kept, **(inherited if model_type != old.model_type else {}), **given})


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


def _part(slot: str, folder: Path, model: BridgeForConditionalGeneration) -> Weights:
    """The weights of a slot, under the model's names; without what adaptations add to it, if the folder has none."""
    found = _weights(slot, folder)
    wanted = {name: value for name, value in model.named_parameters() if name.startswith(PARTS[slot])}
    taken: Weights = {}
    for name, value in wanted.items():
        if name not in found:
            if slot in ("decoder", "vision") and _added(name):
                continue
            raise ValueError(f"parts.{slot}: {folder} has no {short_name(name)!r}; is it of the same kind?")
        if name.endswith(POSITIONS) and found[name].shape != value.shape:
            taken[name] = resized(found[name], _pictures(folder), model.config.vision_config)
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


def _weights(slot: str, folder: Path) -> Weights:
    """Of the model in `folder`, adapters merged in, under the names a bridge has for `slot`."""
    from rlhf.foreign import open_model

    if AutoConfig.from_pretrained(base_of(folder)).model_type == MODEL_TYPE:
        state = open_model(str(folder))[0].state_dict()
        return {name: value for name, value in state.items() if name.startswith(PARTS[slot])}
    if base_of(folder) != folder:
        raise ValueError(f"parts.{slot}: {folder} holds adapters of no bridge; merge them into their base with peft")
    if slot == "vision":
        whole = AutoModel.from_pretrained(folder)
        state = getattr(whole, "vision_model", whole).state_dict()
        return {f"model.vision.tower.{name}": value for name, value in state.items()}
    if slot == "decoder":
        state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        return {re.sub(r"^model\.", "model.language_model.", name): value for name, value in state.items()}
    raise ValueError(f"parts.{slot}: {folder} holds no bridge, and a {slot} is a part of bridges only")


def _pictures(folder: Path) -> PretrainedConfig:
    """What says how large the pictures of a vision encoder are."""
    config = AutoConfig.from_pretrained(base_of(folder))
    return cast(PretrainedConfig, getattr(config, "vision_config", config))
