"""Pictures that an answer signals: what a bridge's head makes of signal tokens is the condition of a diffusion model
(NExT-GPT, 2309.05519, section 3.3).

    rlhf draw runs/next_gpt/stages/04-instruct/artifact "draw the digits two and seven." --generator sd15 --out pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rlhf.batching import BridgeVisual, collate
from rlhf.bridge.heads import HEADS
from rlhf.bridge.heads.signals import Signals
from rlhf.data.formatting import as_prompt
from rlhf.data.rows import Row
from rlhf.foreign import open_model
from rlhf.models import local_folder
from rlhf.recipe import Chat
from rlhf.types import Sample


class DrawingError(ValueError):
    """A model or generator that cannot draw; says what is missing."""


@dataclass(frozen=True)
class Answer:
    """What was said, and for each signal in it what the head makes of it: conditions [signals, length, out]."""

    text: str
    conditions: torch.Tensor


class Painter:
    """An artifact and a diffusion pipeline of the kind that its head was aligned to. Raises DrawingError where the two
    do not fit."""

    def __init__(self, model: Path, generator: str) -> None:
        from rlhf.bridge import BridgeForConditionalGeneration

        self.model, self.processor, _ = open_model(str(model))
        table = self.model.config.head if isinstance(self.model, BridgeForConditionalGeneration) else None
        head = None if table is None else HEADS.make(table)
        if not isinstance(head, Signals):
            raise DrawingError(f'{model} has no head that reads signals: train one with head.type = "signals"')
        self.model.eval()
        self.head = head
        self.pipeline = _pipeline(generator)
        found = self.pipeline.tokenizer.model_max_length, self.pipeline.unet.config.cross_attention_dim
        if found != (head.length, head.out):
            raise DrawingError(
                f"{generator} is conditioned on {found[0]} vectors of {found[1]} dimensions, and the head of {model} "
                f"gives {head.length} of {head.out}: take the generator whose text encoder it was aligned to"
            )

    @torch.no_grad()
    def answer(self, row: Row, max_tokens: int = 64) -> Answer:
        """The likeliest answer to a row's question."""
        prompt = as_prompt(row, "prompt", 0, self.processor.tokenizer, False, Chat())
        start = tuple(self.processor.expand(prompt.token_ids, [media.size for media in prompt.media]))
        ids, eos = start, self.processor.tokenizer.eos_token_id
        for _ in range(max_tokens):
            out = self.model(**self._inputs(ids, prompt.media), use_cache=False, logits_to_keep=2)
            ids = (*ids, int(out.logits[0, 0].argmax()))
            if ids[-1] == eos:
                break
        tokens, answered = self.head.tokens, range(len(start), len(ids))
        places = [list(range(i, i + len(tokens))) for i in answered if ids[i : i + len(tokens)] == tokens]
        text = self.processor.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)
        if not places:
            return Answer(text, torch.empty(0, self.head.length, self.head.out))
        inputs, spelt = self._inputs(ids, prompt.media), torch.tensor(places)
        out = self.model(**inputs, use_cache=False, logits_to_keep=1, signal_places=spelt)
        return Answer(text, out.signals)

    def _inputs(self, ids: Sequence[int], media: Sequence[Any]) -> dict[str, Any]:
        """The model's inputs of a row, and of one token after it, which nothing before it sees."""
        sample = Sample("prompt", (*ids, self.processor.tokenizer.eos_token_id), len(ids), tuple(media))
        return dict(collate([sample], BridgeVisual(self.processor, packs=False)).model_inputs())

    @torch.no_grad()
    def draw(
        self, conditions: torch.Tensor, steps: int = 50, guidance: float = 7.5, seed: int = 0
    ) -> list[Image.Image]:
        """A picture for each condition; with `guidance` above 1 away from what the generator makes of no words."""
        nothing, _ = self.pipeline.encode_prompt("", "cpu", 1, False)
        return [
            self.pipeline(
                prompt_embeds=condition[None].to(nothing.dtype),
                negative_prompt_embeds=nothing,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for condition in conditions
        ]


def _pipeline(generator: str) -> Any:
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise DrawingError("diffusers is not installed: pip install thinkfusion[pictures]") from error
    try:
        found = StableDiffusionPipeline.from_pretrained(str(local_folder(generator)))
    except (OSError, ValueError) as error:
        raise DrawingError(f"{generator} is no Stable Diffusion pipeline: {error}") from error
    found.set_progress_bar_config(disable=True)
    return found
