"""What signals are to say: a frozen text encoder's embeddings of captions (NExT-GPT, 2309.05519, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from rlhf.batching import Tensors
from rlhf.bridge.heads import HEADS
from rlhf.bridge.heads.signals import Signals
from rlhf.models import local_folder
from rlhf.types import Batch, Sample


class Target:
    """Captions -> [captions, length, out]. Raises ValueError where the encoder's embeddings have another shape."""

    def __init__(self, table: dict[str, Any], tokenizer: Any, device: torch.device) -> None:
        head = HEADS.make(table)
        if not isinstance(head, Signals):
            raise ValueError(f"head.type = {table['type']!r} has no signals to align")  # noqa: TRY004 - of a recipe
        self.head, self.device = head, device
        if head.encoder:
            folder = str(local_folder(head.encoder))
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._encoder: Any = CLIPTextModel.from_pretrained(folder)
        else:
            self._tokenizer, self._encoder = tokenizer, _random(head, len(tokenizer))
        config = self._encoder.config
        found = config.max_position_embeddings, config.hidden_size
        if found != (head.length, head.out):
            raise ValueError(
                f"head.signals: {head.encoder} embeds {found[0]} tokens in {found[1]} dimensions; set length and out so"
            )
        self._encoder.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        length = self.head.length
        rows = [self._tokenizer(caption, truncation=True, max_length=length).input_ids[:length] for caption in captions]
        fill = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([row + [fill] * (length - len(row)) for row in rows], device=self.device)
        found: torch.Tensor = self._encoder(ids).last_hidden_state
        return found

    def places(self, samples: Sequence[Sample], tensors: Tensors) -> tuple[torch.Tensor, list[str]]:
        """Which of the model's input tokens spell signals [signals, tokens], and what they are to say; where no row of
        a micro-batch has one, a place that does not count, so that every rank runs the head."""
        tokens, found, captions = self.head.tokens, list[list[int]](), list[str]()
        for row, sample in enumerate(samples):
            if not _counts(sample):
                continue
            ids = sample.token_ids
            starts = [i for i in range(sample.prompt_length, len(ids)) if ids[i : i + len(tokens)] == tokens]
            if not starts:
                raise ValueError(
                    f"sample {sample.key} is to signal {sample.signal!r}, but its answer does not spell the signal's "
                    f"tokens {tokens}: end the answer with the tokens that head.tokens names"
                )
            places = range(starts[-1], starts[-1] + len(tokens))
            width, packing = tensors.input_ids.shape[1], tensors.packing
            found.append([row * width + p if packing is None else int(packing.places[row, p]) for p in places])
            captions.append(sample.signal)
        return torch.tensor(found or [[0] * len(tokens)], device=self.device), captions

    def missed(self, signals: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Σ over signals of the mean over positions of ‖u − v‖₂, u what the head says and v the caption's embedding."""
        nothing = 0.0 * signals.sum()
        if not captions:
            return nothing
        return (signals.float() - self(captions)).norm(dim=-1).mean(1).sum() + nothing


def signalling(batch: Batch) -> int:
    """How many rows of all ranks have a signal that counts."""
    return sum(_counts(sample) for mine in batch.micro_batches for part in mine for sample in part)


def _counts(sample: Sample) -> bool:
    return bool(sample.signal) and sample.weight != 0


def _random(head: Signals, vocabulary: int) -> CLIPTextModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=head.out,
                intermediate_size=2 * head.out,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=head.length,
                eos_token_id=vocabulary - 1,
            )
        )
