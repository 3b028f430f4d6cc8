"""Writes a tiny random Qwen3-VL, processor and chat template included, into a folder: an ordinary Hugging Face
vision-language model. A program of its own, since its processor needs torchvision: `python tiny_qwen3vl.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import rlhf  # noqa: F401 - before transformers: it prepares for torchvision

import torch  # isort: skip
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # isort: skip
from transformers import (  # isort: skip
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
MARKS += ("<|video_pad|>",)
TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's marks."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["what is the sum? read the digits. user assistant think first. \\boxed{3 5}"] * 20
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=320, special_tokens=list(MARKS), initial_alphabet=alphabet)
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(MARKS),
    )
    found.chat_template = TEMPLATE
    return found


def write(folder: Path) -> None:
    """Model (two layers, deepstack features in both) and processor."""
    words = tokenizer()
    marks = {mark: words.convert_tokens_to_ids(mark) for mark in MARKS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 512,
            # transformers always interleaves; vLLM must be told, as the published configurations do
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=marks["<|image_pad|>"],
        video_token_id=marks["<|video_pad|>"],
        vision_start_token_id=marks["<|vision_start|>"],
        vision_end_token_id=marks["<|vision_end|>"],
        tie_word_embeddings=True,
        eos_token_id=marks["<|im_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # far from uniform: a lost feature must show in the log-probs
    model.save_pretrained(folder)
    sizes = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    half = [0.5, 0.5, 0.5]  # Qwen3-VL's own
    pictures = Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, temporal_patch_size=2, size=sizes, image_mean=half, image_std=half
    )
    videos = Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
    Qwen3VLProcessor(pictures, words, videos, chat_template=TEMPLATE).save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
