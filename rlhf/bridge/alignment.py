"""What pairs of a picture and a caption teach without the decoder; each loss a mean over pairs.

BLIP-2's first stage (2301.12597, section 3.2), by which queries learn to read of a picture what its caption says:

itc  contrast: of all pictures and captions of a micro-batch, on all ranks, a pair's own are most alike; the likeness of
     a picture is that of its best query; label smoothing 0.1, both directions
itm  matching: whether picture and caption belong together, over the pairs and as many false ones of either kind, drawn
     by their likeness; every query sees the caption
itg  generation: the caption, word by word, from queries that do not see it; label smoothing 0.1

Flamingo's, for its encoder (2204.14198, appendix B.1.1), against a text encoder of its own (`head.contrast`):

contrast  of all pictures and captions, as in itc, a pair's own are most alike; the sum of both directions
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy, normalize

from rlhf.bridge.layers.contrast import ContrastHead
from rlhf.bridge.layers.qformer import Heads, Reader

SMOOTHING = 0.1
Losses = dict[str, torch.Tensor]


def align(reader: Reader, features: torch.Tensor, captions: torch.Tensor, wanted: Iterable[str], own: int) -> Losses:
    """The losses `wanted` of features [pairs, features, vision width] and captions [pairs, length], -1 after their end.
    Of the pairs the first `own` count; a rank that has none brings one that does not."""
    heads, words, places = reader.heads, reader.words, reader.places
    if heads is None or words is None or places is None:
        raise ValueError("this bridge's connector has no heads for itc, itm and itg: set connector.aligned = 256")
    source = features if reader.norm_vision is None else reader.norm_vision(features)
    captions = captions[:, : places.num_embeddings - 1]
    count, (pairs, length) = reader.queries.shape[0], captions.shape
    queries = reader.queries.expand(pairs, -1, -1)
    seen = torch.nn.functional.pad(captions >= 0, (1, 0), value=True)  # [pairs, 1 + length]
    body = words(captions.clamp(min=0))

    def text(start: int) -> torch.Tensor:
        begun = torch.cat((heads.starts[start].expand(pairs, 1, -1), body), dim=1)
        return begun + places.weight[: length + 1]

    told = reader.qformer(queries, source, count)
    alone = reader.qformer(text(0), source, 0, seen[:, None, None])[:, 0]
    likeness = _likeness(heads, told, alone, own)
    found: Losses = {}
    if "itc" in wanted:
        found["itc"] = _contrast(*likeness, own)
    if "itm" in wanted:
        found["itm"] = _matching(reader, heads, source, queries, text(0), seen, likeness[0][:, :pairs], own)
    if "itg" in wanted:
        # queries see one another; text sees them, itself and what stands before it
        size = count + length + 1
        mask = torch.ones(size, size, dtype=torch.bool, device=captions.device).tril()
        mask[:count, :count] = True
        states = reader.qformer(torch.cat((queries, text(1)), dim=1), source, count, mask[None, None])
        logits = heads.words(states[:own, count:-1], words.weight)
        found["itg"] = _mean(logits.transpose(1, 2), captions[:own])
    nothing = 0.0 * (told.sum() + alone.sum())  # every rank runs backward through the whole reader
    return {name: value + nothing for name, value in found.items()}


def contrast(head: ContrastHead, features: torch.Tensor, captions: torch.Tensor, own: int) -> torch.Tensor:
    """Flamingo's loss; as `align`."""
    pictures, texts = head(features, captions)
    scale, target = head.inverse_temperature, torch.arange(own, device=features.device)
    terms = [
        _mean((one[:own] @ _of_all_ranks(other, own).T) * scale, target, smoothing=0.0)
        for one, other in ((pictures, texts), (texts, pictures))
    ]
    return terms[0] + terms[1] + 0.0 * (pictures.sum() + texts.sum() + scale.sum())


def _likeness(heads: Heads, told: torch.Tensor, alone: torch.Tensor, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[pairs, all captions] and [pairs, all pictures], this rank's first, divided by the temperature."""
    pictures, texts = normalize(heads.vision(told), dim=-1), normalize(heads.text(alone), dim=-1)
    all_pictures, all_texts = _of_all_ranks(pictures, own), _of_all_ranks(texts, own)
    of_pictures = torch.einsum("pqs,ts->ptq", pictures, all_texts).amax(-1)
    of_texts = torch.einsum("ts,pqs->tpq", texts, all_pictures).amax(-1)
    return of_pictures / heads.temperature, of_texts / heads.temperature


def _of_all_ranks(mine: torch.Tensor, own: int) -> torch.Tensor:
    """This rank's, and then what counts of the others', whose gradients go back to them."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return mine
    sizes = torch.zeros(distributed.get_world_size(), dtype=torch.long, device=mine.device)
    sizes[distributed.get_rank()] = own
    distributed.all_reduce(sizes)
    most = max(1, int(sizes.max()))
    padded = torch.cat((mine[:own], mine.new_zeros(most - own, *mine.shape[1:])))
    parts = all_gather(padded)
    counts = enumerate(zip(parts, sizes.tolist(), strict=True))
    return torch.cat((mine, *(part[:size] for rank, (part, size) in counts if rank != distributed.get_rank())))


def _contrast(of_pictures: torch.Tensor, of_texts: torch.Tensor, own: int) -> torch.Tensor:
    target = torch.arange(own, device=of_pictures.device)
    both = [_mean(found[:own], target) for found in (of_pictures, of_texts)]
    return (both[0] + both[1]) / 2


def _matching(
    reader: Reader,
    heads: Heads,
    source: torch.Tensor,
    queries: torch.Tensor,
    text: torch.Tensor,
    seen: torch.Tensor,
    likeness: torch.Tensor,
    own: int,
) -> torch.Tensor:
    """Over the pairs and, where there is more than one, as many with another picture and with another caption."""
    place = torch.arange(len(source), device=source.device)
    pictures, captions, labels = place[:own], place[:own], [1] * own
    if own > 1:
        others = likeness[:own, :own].detach().float().fill_diagonal_(-1e4)
        wrong_captions = torch.multinomial(others.softmax(1), 1)[:, 0]
        wrong_pictures = torch.multinomial(others.T.softmax(1), 1)[:, 0]
        pictures = torch.cat((pictures, wrong_pictures, place[:own]))
        captions = torch.cat((captions, place[:own], wrong_captions))
        labels += [0] * (2 * own)
    if not own:
        pictures = captions = place[:1]
    both = torch.cat((queries[pictures], text[captions]), dim=1)
    count = queries.shape[1]
    mask = torch.nn.functional.pad(seen[captions], (count, 0), value=True)[:, None, None]
    states = reader.qformer(both, source[pictures], count, mask)[:, :count]
    logits = heads.match(states).mean(1)
    return _mean(logits[: len(labels)], torch.tensor(labels, device=source.device), smoothing=0.0) + 0.0 * logits.sum()


def _mean(logits: torch.Tensor, target: torch.Tensor, smoothing: float = SMOOTHING) -> torch.Tensor:
    """The mean cross entropy of logits [rows, classes, ...]; 0 without rows, and -1 in the target counts nothing."""
    if not len(logits):
        return logits.sum()
    return cross_entropy(logits.float(), target, label_smoothing=smoothing, ignore_index=-1)
