"""Bridges from a recipe, and from a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from rlhf.bridge.config import BridgeConfig, is_moe
from rlhf.bridge.decoders import DECODERS, PREFIX, own, require_underived
from rlhf.bridge.heads import HEADS
from rlhf.bridge.layers.told import ToldModel
from rlhf.bridge.model import BridgeForConditionalGeneration, BridgeMoeForConditionalGeneration
from rlhf.bridge.naming import PATCHES, SLOTS
from rlhf.bridge.packers import PACKERS
from rlhf.bridge.processor import BridgeImageProcessor, BridgeProcessor
from rlhf.slots import Slot, unknown

VISION_TYPES = {
    "siglip": "siglip_vision_model",
    "aimv2": "aimv2_vision_model",
    "clip": "clip_vision_model",
    "patches": PATCHES,
}
# Read by transformers though not fields of every config class that honours them.
MORE_KEYS = ("head_dim", "rope_theta")
IMAGE_TOKEN = "<image>"  # noqa: S105 - a token of text


def config_of(slot: str, model_type: str, keys: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of a slot's table. Raises `ValueError` for a key that it does not have."""
    cls = CONFIG_MAPPING[model_type]
    common = {field.name for field in dataclasses.fields(PretrainedConfig)}
    allowed = {field.name for field in dataclasses.fields(cls)} - common | {*MORE_KEYS, "initializer_range"}
    for key in keys:
        if key not in allowed:
            raise unknown(f"{slot} key", key, ["type", *allowed])
    return cls(**keys)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | int) -> int:
    """Of a special token, or of text that is one token (a comma, a new line)."""
    if isinstance(token, int):
        return token
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the tokenizer has no token {token!r}: add it as a special token first")
    return int(ids[0])


def with_ids(slot: Slot[Any], table: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A recipe's packer or head with ids in place of the tokens it names."""
    found = dict(table)
    for key in slot.find(found).token_keys:
        named = found.get(key)
        if isinstance(named, list | tuple):
            found[key] = [_token_id(tokenizer, token) for token in named]
        elif named is not None:
            found[key] = _token_id(tokenizer, named)
    return found


def named_in(kind: str, decoder: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The keys of a decoder of `DECODERS`, ids in place of the tokens that it names, or names where they are silent."""
    own_type: Any = DECODERS.find({"type": kind})
    silent = {key: getattr(own_type, key) for key in own_type.token_keys if key not in decoder}
    return {
        key: v for key, v in with_ids(DECODERS, {"type": kind, **decoder, **silent}, tokenizer).items() if key != "type"
    }


def new(config: BridgeConfig, seed: int) -> BridgeForConditionalGeneration:
    """A randomly initialised model; the caller's random state is left alone."""
    cls = BridgeMoeForConditionalGeneration if is_moe(config.text_config) else BridgeForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
    begin(model, [name for name, _ in model.named_parameters()])
    return model


def begin(model: BridgeForConditionalGeneration, names: Iterable[str]) -> None:
    """Of the model's parameters `names` begin afresh; the decoder gives its own their first values."""
    decoder, home = model.model.language_model, "model.language_model."
    if isinstance(decoder, ToldModel):
        decoder.begin({name.removeprefix(home) for name in names if name.startswith(home)})


def build(
    spec: Mapping[str, Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[BridgeForConditionalGeneration, BridgeProcessor]:
    """A randomly initialised bridge from a recipe's `[model.bridge]`.

    `spec` has a table for each slot: `vision`, `decoder` and `tiler` are required. `vision` and `decoder` take a
    `type` and any key of that transformers config; the others are read by their packages. The tokenizer holds
    `<image>`, a pad and an eos token, and any token that the packer names. Raises `ValueError` on an unknown key.
    """
    for key in spec:
        if key not in SLOTS:
            raise unknown("bridge slot", key, SLOTS)
    for key in ("vision", "decoder", "tiler"):
        if key not in spec:
            raise ValueError(f"a bridge needs a {key!r} table")
    vision, decoder = dict(spec["vision"]), dict(spec["decoder"])
    vision_type, decoder_type = vision.pop("type", None), decoder.pop("type", None)
    if vision_type not in VISION_TYPES:
        raise unknown("vision type", vision_type, VISION_TYPES)
    if decoder_type in DECODERS.types():
        decoder = named_in(decoder_type, decoder, tokenizer)
        decoder_type = PREFIX + decoder_type
    if decoder_type not in CONFIG_MAPPING:
        raise unknown("decoder type", decoder_type, [*CONFIG_MAPPING.keys(), *DECODERS.types()])
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer needs a pad and an eos token")
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if (ours := own({"type": decoder_type.removeprefix(PREFIX), **decoder})) is not None:
        require_underived(ours, decoder)
    text = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id} | ends | decoder
    if text["vocab_size"] < len(tokenizer):
        raise ValueError(f"decoder.vocab_size {text['vocab_size']} is below the tokenizer's {len(tokenizer)}")
    config = BridgeConfig(
        vision_config=config_of("vision", VISION_TYPES[vision_type], vision),
        text_config=config_of("decoder", decoder_type, text),
        tiler=dict(spec["tiler"]),
        encoder=dict(spec.get("encoder", {"type": "tower"})),
        connector=dict(spec.get("connector", {"type": "mlp"})),
        packer=with_ids(PACKERS, spec.get("packer", {"type": "segments"}), tokenizer),
        head=with_ids(HEADS, spec["head"], tokenizer) if "head" in spec else None,
        image_token_id=_token_id(tokenizer, IMAGE_TOKEN),
        **ends,
    )
    processor = processor_of(config, tokenizer)
    return new(config, seed), processor


def processor_of(config: BridgeConfig, tokenizer: PreTrainedTokenizerBase) -> BridgeProcessor:
    """The bridge's processor. Raises `ValueError` where the tokenizer does not read a picture's pattern back: vLLM has
    it as text; or where it does not end prompts with the token that tells an encoder from a decoder."""
    processor = BridgeProcessor(BridgeImageProcessor(config.geometry.to_dict()), tokenizer)
    for size in config.geometry.tiler.extremes:
        pattern = config.geometry.expand([config.image_token_id], [size])
        if tokenizer.encode(processor.pattern_text(size), add_special_tokens=False) != pattern:
            raise ValueError(f"packer: the tokenizer does not read back the tokens {config.packer} as they are written")
    if config.reply_token_id is not None and tokenizer.chat_template:
        require_reply(config.reply_token_id, tokenizer)
    return processor


def require_reply(token: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where the chat template does not end prompts with what tells a decoder from an encoder."""
    question = [{"role": "user", "content": "?"}]
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(asked, add_special_tokens=False)
    if token not in ids:
        named, ends = tokenizer.convert_ids_to_tokens(token), tokenizer.convert_ids_to_tokens(ids[-3:])
        raise ValueError(
            f"decoder.reply = {named!r}: the tokenizer's chat template does not end prompts with it, but with {ends}; "
            "name the token that does"
        )


def load(path: str | PathLike[str]) -> tuple[BridgeForConditionalGeneration, BridgeProcessor]:
    """The model (in evaluation mode) and processor of a saved folder. Raises `ValueError` if the two disagree, or where
    weights are missing: transformers would put anything in their place."""
    model, loaded = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(path)
    if not isinstance(model, BridgeForConditionalGeneration) or not isinstance(processor, BridgeProcessor):
        raise ValueError(  # noqa: TRY004 - the folder is wrong, not the type of an argument
            f"{path} holds a {type(model).__name__} with a {type(processor).__name__}, not a bridge"
        )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{path} lacks {len(missing)} weights of its model, {missing[0]} among them; save it whole")
    if processor.geometry != model.config.geometry:
        raise ValueError(f"{path}: its image processor and its config.json describe different pictures")
    return model, processor
