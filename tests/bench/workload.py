"""What both sides are given: a tiny mixture-of-experts bridge, questions with pictures, and how long answers are.

The model has random weights, but for one thing: dimension 0 of every embedding is large, so that after the last norm
it is nearly the same number at every position, and the head reads the end of text from it alone. Both sides then draw
lengths from one distribution: geometric with mean `mean_length`, cut at `max_tokens`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rlhf import bridge
from rlhf.data.tokenizer import train_tokenizer
from rlhf.recipe import Chat

ROWS, SIDE, VOCABULARY = 256, 32, 300
PROMPTS, GROUP = 32, 8  # a step: 256 completions, as in the digits recipe
SPEC = {
    "vision": {
        "type": "siglip",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    },
    "tiler": {"type": "single", "size": [SIDE, SIDE], "fit": "stretch"},
    "connector": {"type": "mlp", "kind": "pixel_shuffle_mlp", "factor": 2},
    "decoder": {
        "type": "qwen3_moe",
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Workload:
    """mean_length: of completions before the cut; None: none ends before max_tokens."""

    name: str
    mean_length: float | None
    max_tokens: int


NATURAL = Workload("natural", 32.0, 256)
FIXED = Workload("fixed64", None, 64)


def make(workload: Workload, folder: Path) -> tuple[Path, Path]:
    """(model folder, rows) of a workload, made once."""
    model_folder, rows = folder / f"model-{workload.name}", make_rows(folder)
    if not model_folder.exists():
        save_model(SPEC, model_folder, VOCABULARY, 0.0 if workload.mean_length is None else 1 / workload.mean_length)
    return model_folder, rows


def make_rows(folder: Path) -> Path:
    """Questions with pictures, made once."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(0)
        lines = []
        for index in range(ROWS):
            picture = Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
            picture.save(folder / f"{index}.png")
            content = [{"type": "image"}, {"type": "text", "text": f"how many red {index}"}]
            lines.append({"messages": [{"role": "user", "content": content}], "image": f"{index}.png"})
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def save_model(spec: Mapping[str, Any], folder: Path, vocabulary: int, end: float | None = None) -> None:
    """A bridge with random weights; `end`: how probable its end of text is at every position, where that is given."""
    tokenizer = train_tokenizer([f"how many red {index}" for index in range(ROWS)], vocabulary, Chat())
    model, processor = bridge.build(spec, tokenizer, seed=0)
    if end is not None:
        _end_with(model, tokenizer.eos_token_id, end)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _end_with(model: bridge.BridgeForConditionalGeneration, end: int, probability: float) -> None:
    """Give the end of text this probability at every position."""
    width, words = model.lm_head.weight.shape[1], model.lm_head.weight.shape[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 30.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[end] = 0.0
        logit = -30.0 if probability == 0.0 else math.log(probability / (1 - probability) * (words - 1))
        # a norm of width d turns a vector of one large entry into √d there, 0 elsewhere
        model.lm_head.weight[end, 0] = logit / math.sqrt(width)
