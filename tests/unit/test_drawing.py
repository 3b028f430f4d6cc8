"""Signals drawn by a diffusion model; a Stable Diffusion of random weights, small."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlhf.bridge import load
from rlhf.cli import main
from rlhf.data.formatters import turn
from rlhf.data.formatting import as_sample
from rlhf.data.rows import media_of
from rlhf.data.tokenizer import TEMPLATE
from rlhf.drawing import DrawingError, Painter
from rlhf.recipe import Chat
from tests.unit.test_bridge_build import tiny
from tests.unit.test_signals import BRIDGE, HEAD, TOKENS

QUESTION = {"messages": [turn("user", "draw two.")], "images": []}


def generator(folder: Path, length: int = 5) -> str:
    """A pipeline for conditions of `length` vectors of 8 dimensions; pictures of 16 x 16 pixels."""
    words = ["<|startoftext|>", "<|endoftext|>", *"abc", *(f"{letter}</w>" for letter in "abc")]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    text = CLIPTextConfig(
        **sizes, num_attention_heads=2, vocab_size=len(words), max_position_embeddings=length, eos_token_id=1
    )
    blocks: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 2}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            **blocks,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            **blocks,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "sd")
    return str(folder / "sd")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model whose likeliest answer spells its signal (the signal is what it says), and a generator."""
    folder = tmp_path_factory.mktemp("drawing")
    model, processor = tiny(marks=TOKENS, **BRIDGE | {"encoder": {"type": "tower"}})  # several features a picture
    processor.tokenizer.chat_template = TEMPLATE
    prompt = as_sample({"messages": [*QUESTION["messages"], turn("assistant", "x")]}, "p", 0, processor, None, Chat())
    ids = list(prompt.token_ids[: prompt.prompt_length])
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    model.config.head = model.config.head | {"tokens": ids[-2:]}
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model", generator(folder / "generator")


def test_a_condition_of_the_generators_own_draws_what_the_generator_draws(made: tuple[Path, str]) -> None:
    painter = Painter(*made)
    own, _ = painter.pipeline.encode_prompt(["a b", "c"], "cpu", 1, False)
    drawn = [np.asarray(picture) for picture in painter.draw(own, steps=3, seed=4)]
    for caption, picture in zip(("a b", "c"), drawn, strict=True):
        chance = torch.Generator().manual_seed(4)
        expected = painter.pipeline(caption, num_inference_steps=3, guidance_scale=7.5, generator=chance).images[0]
        assert np.abs(picture.astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert np.abs(drawn[0].astype(int) - drawn[1].astype(int)).max() > 2  # the control: conditions matter


@torch.no_grad()
def test_an_answers_signals_are_the_heads(made: tuple[Path, str]) -> None:
    painter = Painter(*made)
    answer = painter.answer(QUESTION, max_tokens=4)
    model, processor = load(made[0])
    assert answer.conditions.shape[1:] == (HEAD["length"], HEAD["out"])
    assert len(answer.conditions) >= 1
    row = {"messages": [*QUESTION["messages"], turn("assistant", "x")], "images": []}
    asked = as_sample(row, "p", 0, processor, None, Chat())
    ids = list(asked.token_ids[: asked.prompt_length])
    for _ in range(4):
        ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    places = torch.tensor([[len(ids) - 2, len(ids) - 1]])
    expected = model(input_ids=torch.tensor([ids]), signal_places=places).signals[0]
    torch.testing.assert_close(answer.conditions[-1], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_after_a_picture_places_are_those_of_the_expanded_row(made: tuple[Path, str]) -> None:
    painter = Painter(*made)
    encoded = io.BytesIO()
    Image.new("RGB", (24, 24), "white").save(encoded, "PNG")
    seen = media_of(encoded.getvalue(), "here")
    row = {"messages": [turn("user", "draw this.", 1)], "images": [seen]}
    said = painter.answer(row, max_tokens=3)
    prompt = as_sample(
        {**row, "messages": [*row["messages"], turn("assistant", "x")]}, "p", 0, painter.processor, None, Chat()
    )
    ids, head = list(prompt.token_ids[: prompt.prompt_length]), painter.head
    for _ in range(3):
        inputs = painter._inputs(ids, prompt.media)
        ids.append(int(painter.model(**inputs).logits[0, -2].argmax()))
    spelt = painter._inputs(ids, prompt.media)
    painter.head = replace(head, tokens=tuple(ids[-2:]))
    answer = painter.answer(row, max_tokens=3)
    assert answer.text == said.text
    last = spelt["input_ids"].shape[1] - 1  # a token after the row
    expected = painter.model(**spelt, signal_places=torch.tensor([[last - 2, last - 1]])).signals[0]
    torch.testing.assert_close(answer.conditions[-1], expected, atol=1e-5, rtol=0)


def test_what_cannot_draw_says_why(made: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(
        DrawingError, match=r"conditioned on 6 vectors of 8 dimensions, and the head of .* gives 5 of 8"
    ):
        Painter(made[0], generator(tmp_path / "longer", length=6))
    with pytest.raises(DrawingError, match="is no Stable Diffusion pipeline"):
        Painter(made[0], str(made[0]))
    model, processor = tiny(**{key: value for key, value in BRIDGE.items() if key != "head"})
    model.save_pretrained(tmp_path / "headless")
    processor.save_pretrained(tmp_path / "headless")
    with pytest.raises(DrawingError, match="has no head that reads signals"):
        Painter(tmp_path / "headless", made[1])


def test_the_command_writes_pictures(
    made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "draw",
        str(made[0]),
        "draw two.",
        "--generator",
        made[1],
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "2",
    ]
    assert main(command) == 0
    files = sorted((tmp_path / "out").glob("*.png"))
    assert files
    assert str(files[0]) in capsys.readouterr().out
    with Image.open(files[0]) as picture:
        assert picture.size == (16, 16)
    assert main([*command, "--image", "nowhere.png"]) == 2
    assert "--image nowhere.png: no such file" in capsys.readouterr().err
