"""What a decoder with layers of its own for pictures is told of each token, beside where it stands.

vLLM's Transformers backend hands a decoder embeddings and positions and nothing else; of M-RoPE models the positions
are three rows (2409.12191). The first is then the position, and the rest says what the decoder is told:

pictures  row 1 − row 0 is the number of the picture the token belongs to, from 1; 0 for text
modality  positions of a row without pictures begin at FAR, whatever the position in it
asked     row 1 − row 0 is 1 for a token of the prompt, 0 for one of the reply; no engine of vLLM's serves it

The first two depend on a prompt alone, and what follows it is right by itself: a sampled token is text, and its
position goes on from the prompt's. The first depends on no more than what stands before a token, so engines may share
prefixes; the second does not (`salt`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.bridge.geometry import Geometry

FAR = 2**20


def position_rows(input_ids: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """[3, rows, length] of expanded `input_ids` [rows, length]; tokens before a row's first may only be padding."""
    if geometry.told == "modality":
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return (positions + _start(input_ids, geometry)).expand(3, -1, -1)
    if geometry.told == "asked":
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return torch.stack((places, places + (places <= _last_asked(input_ids, geometry)), places))
    advance, told = _pictures(input_ids, geometry)
    positions = (advance.cumsum(dim=1) - 1).clamp(min=0)
    return torch.stack((positions, positions + told, positions))


def next_position(input_ids: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """[rows]: the position of the token that follows."""
    if geometry.told == "modality":
        return input_ids.shape[1] + _start(input_ids, geometry)[:, 0]
    if geometry.told == "asked":
        return torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    return _pictures(input_ids, geometry)[0].sum(dim=1)


def _start(input_ids: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """[rows, 1]: where positions begin, of rows with pictures and without."""
    return FAR * ~(input_ids == geometry.image_token_id).any(dim=1, keepdim=True)


def _last_asked(input_ids: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """[rows, 1]: the place of a prompt's last token: the first that begins a reply, else the last placeholder, else
    the row's first token."""
    assert geometry.reply_token_id is not None
    begins, shown = input_ids == geometry.reply_token_id, input_ids == geometry.image_token_id
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_shown = (shown * places).amax(dim=1, keepdim=True)
    return torch.where(begins.any(dim=1, keepdim=True), begins.int().argmax(dim=1, keepdim=True), last_shown)


def _pictures(input_ids: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token [rows, length] by how much it advances positions, and the number of its picture, 0 for text."""
    places = input_ids == geometry.image_token_id
    steps, belongs = (torch.tensor(found, device=input_ids.device) for found in geometry.placing)
    order = (places.cumsum(dim=1) - 1).clamp(min=0)  # among all of the row's placeholders
    within, number = order % len(steps), order // len(steps) + 1
    return torch.where(places, steps[within], 1), torch.where(places, number * belongs[within], 0)


def salt(token_ids: Sequence[int], geometry: Geometry) -> str | None:
    """What keeps apart, in an engine's cache of prefixes, prompts whose common prefix is not computed alike."""
    if geometry.told != "modality":
        return None
    return "pictures" if geometry.image_token_id in token_ids else "text"
