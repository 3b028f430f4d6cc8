"""Opening and building models on the driver: folders only, no weights in memory longer than it takes to write them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoProcessor

import rlhf.bridge
from rlhf.architecture import SLOT_DEFAULTS, Architecture, base_of, of_config
from rlhf.bridge.decoders import DECODERS
from rlhf.bridge.heads import HEADS
from rlhf.bridge.packers import PACKERS
from rlhf.data.rows import Rows
from rlhf.data.tokenizer import adopt_tokenizer, train_tokenizer
from rlhf.foreign import ForeignProcessor
from rlhf.recipe import Rebuild, Recipe
from rlhf.slots import laid_over
from rlhf.stage import derive

TOKENIZER_ROWS = 2000  # rows of each source the tokenizer is trained on


def build_model(recipe: Recipe, sources: Mapping[str, Rows], folder: Path) -> None:
    """Train the tokenizer on the recipe's rows, or take the one it names, build the bridge of [model] from random
    weights, save both."""
    assert recipe.model.bridge is not None
    settings = recipe.model.tokenizer
    marks = [*settings.marks, *(mark for bridge in bridges_of(recipe) for mark in marks_of(bridge))]
    if settings.path is not None:
        tokenizer = adopt_tokenizer(local_folder(settings.path), marks)
    else:
        bodies = (text for rows in sources.values() for text in texts(rows))
        tokenizer = train_tokenizer(bodies, settings.vocab_size, recipe.chat, marks)
    seed = derive(recipe.seed, "model") % 2**31
    model, processor = rlhf.bridge.build(recipe.model.bridge, tokenizer, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def bridges_of(recipe: Recipe) -> Iterator[dict[str, dict[str, Any]]]:
    """The tables of the bridge to build, and of each that a stage makes of the one before."""
    tables: dict[str, dict[str, Any]] = {**SLOT_DEFAULTS, **(recipe.model.bridge or {})}
    yield tables
    for stage in recipe.stages:
        if isinstance(stage, Rebuild):
            tables = tables | {slot: laid_over(tables.get(slot, {}), over) for slot, over in stage.bridge.items()}
            tables = {slot: table for slot, table in tables.items() if table}  # a head that was removed
            yield tables


def marks_of(bridge: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The tokens that parts of a bridge name, that are no single byte, and that a tokenizer must be taught."""
    for slot, components in (("packer", PACKERS), ("head", HEADS), ("decoder", DECODERS)):
        table = bridge.get(slot, {})
        for key in components.find(table).token_keys if table.get("type") in components.types() else ():  # type: ignore[attr-defined]
            named = table.get(key, getattr(components.find(table), key, None))
            for token in named if isinstance(named, list | tuple) else [named]:
                if isinstance(token, str) and len(token.encode()) > 1:
                    yield token


def texts(rows: Rows) -> Iterator[str]:
    """Every piece of text in the messages of the first rows."""
    for index in range(min(len(rows), TOKENIZER_ROWS)):
        for message in rows[index]["messages"]:
            content = message["content"]
            if isinstance(content, str):
                yield content
            else:
                yield from (part["text"] for part in content if part.get("text"))


def local_folder(path: str) -> Path:
    """The folder of a model given as folder or hub name; the latter is fetched into Hugging Face's cache, once."""
    folder = Path(path)
    return folder if folder.is_dir() else Path(snapshot_download(path))


def load_processor(folder: Path) -> Any:
    """The processor of a bridge folder or of any Hugging Face vision-language model."""
    rlhf.bridge.register()
    processor = AutoProcessor.from_pretrained(str(folder))
    return processor if hasattr(processor, "expand") else ForeignProcessor(processor)


def architecture_as_saved(folder: Path) -> Architecture:
    """The architecture of a folder as transformers would write it: an artifact's is then that of the published model
    it came from, whose keys may have older names."""
    rlhf.bridge.register()
    base = base_of(folder)
    return of_config(json.loads(AutoConfig.from_pretrained(str(base)).to_json_string()), base)


def masked_ids(processor: Any) -> tuple[int, ...]:
    """Token ids a policy may never sample: media placeholders and padding."""
    placeholders = getattr(processor, "media_token_ids", (processor.image_token_id,))
    ids = {*placeholders, processor.tokenizer.pad_token_id}
    return tuple(sorted(ids - {None, processor.tokenizer.eos_token_id}))
