"""Attention over packed rows: N tokens laid end to end, where rows that share a prompt share its tokens.

Everything but attention works token by token: it sees no padding, and computes the prompt of a group once, however many
rollouts the group has. Attention alone takes the rows apart again (`rlhf.batching.Packing`). Padding needs no mask
there: it is on the right, where no causal query looks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from rlhf.batching import Runs

NAME = "by_row"


def attend_by_row(decoder: PreTrainedModel) -> None:
    """Let `decoder` take packed rows, and nothing else: forward then needs row_places and row_owned. Raises ValueError
    for a decoder whose tokens meet elsewhere than in full attention."""
    kinds = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention"}
    if getattr(decoder.config, "sliding_window", None) is not None:
        kinds.add("a sliding window")
    AttentionInterface.register(NAME, by_row)
    if not kinds:
        decoder.set_attn_implementation(NAME)
    if kinds or decoder.config._attn_implementation != NAME:  # transformers warns only
        found = ", ".join(sorted(kinds)) or "an attention of its own"
        raise ValueError(
            f"{type(decoder).__name__} has {found}: its rows cannot be packed; set resources.packing = false"
        )


def by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_places: Tensor | None = None,
    row_owned: Tensor | None = None,
    row_runs: Runs = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row: query [1, heads, N, width], key and value [1, key heads, N, width] to
    [1, N, heads, width]; row_places [M], row_owned [N] and row_runs as `Packing.apart` gives them."""
    if row_places is None or row_owned is None or attention_mask is not None:
        raise ValueError(f"{type(module).__name__} takes packed rows: give row_places and row_owned, and no mask")
    grouped = query.shape[1] != key.shape[1]
    # Looked up, not indexed: rows add up their gradients of a token that they share, and only a lookup's backward adds
    # in one order whatever the number of threads
    apart = (embedding(row_places, part[0].transpose(0, 1).flatten(1)) for part in (query, key, value))
    runs = zip(row_runs, *(part.split([rows * length for rows, length in row_runs]) for part in apart), strict=True)
    found = []
    for (rows, length), *parts in runs:
        q, k, v = (
            part.view(rows, length, whole.shape[1], -1).transpose(1, 2)
            for part, whole in zip(parts, (query, key, value), strict=True)
        )
        out = scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).index_select(0, row_owned)[None], None
