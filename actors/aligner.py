"""The policy of a stage that teaches its connector to read pictures, without the decoder (`rlhf.bridge.alignment`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from actors.learner import Totals
from actors.policy import Policy
from rlhf.batching import read_media
from rlhf.routing import Usage
from rlhf.types import Batch, Sample


class Aligner(Policy):
    """Learns from pairs: rows with one picture each, whose answers are its captions."""

    role = "the connector"
    advice = "lower the learning rate"

    def accumulate(
        self,
        batch: Batch,
        totals: Totals,
        fresh: bool,  # noqa: ARG002 - nothing of a batch was sampled
    ) -> tuple[list[Tensor], Usage | None]:
        """Gradients of one batch on this rank: itc and itm are means over its pairs, itg over its captions' tokens."""
        rows, wanted = batch.micro_batches[self.rank], self.spec.objectives
        self.engine.train()
        for index, samples in enumerate(rows):
            pixels, captions = self._pairs(samples)
            losses = self.engine(
                pixel_values=pixels, captions=captions, objectives=tuple(wanted), pairs=len(samples), use_cache=False
            )
            tokens = sum(sample.num_learned for sample in samples)
            shares = dict.fromkeys(wanted, len(samples) / max(1, batch.num_rows))
            shares |= {"itg": tokens / max(1, batch.num_tokens)} if "itg" in wanted else {}
            loss = torch.stack([weight * shares[name] * losses[name] for name, weight in wanted.items()]).sum()
            # metrics are divided by the batch's tokens
            totals.collect({name: shares[name] * value.detach() * batch.num_tokens for name, value in losses.items()})
            totals.sums["tokens"] += tokens
            self.backward(loss, samples, totals, last=index == len(rows) - 1)
        return [], None

    def _pairs(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Pixels [pairs, 3, height, width] and captions [pairs, length], -1 after their end; of no samples one that
        does not count."""
        for sample in samples:
            if len(sample.media) != 1:
                raise ValueError(
                    f"sample {sample.key} has {len(sample.media)} pictures; objectives compare one with its "
                    "caption: leave the row out"
                )
            if sample.skipped:
                raise ValueError(
                    f"sample {sample.key} is a conversation of several replies; objectives take the answer for a "
                    'caption: set chat.supervise = "last", or leave the row out'
                )
        read = [read_media(sample, sample.media[0], self.visual)["pixel_values"] for sample in samples]
        texts = [torch.tensor(sample.token_ids[sample.prompt_length :]) for sample in samples]
        if not samples:
            read, texts = [torch.zeros(1, 3, *self.processor.geometry.tiler.cell)], [torch.tensor([self.visual.pad_id])]
        captions = pad_sequence(texts, batch_first=True, padding_value=-1)
        return torch.cat(read).to(self.device), captions.to(self.device)
