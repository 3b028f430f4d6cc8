"""From samples to the tensors of a forward pass.

samples ─make_batch→ Batch: ranks × micro-batches of one optimizer step (on the driver, no torch tensors)
one micro-batch ─collate→ Tensors (on the rank, decoding its own pixels)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.types import Batch, Media, Sample

# What one more forward and backward costs beside its tokens, as a share of the token budget: 128 tokens of 4,096. On
# two CPU cores with a decoder of width 128 it was 80 on judge rows, 300 on short ones
CALL_COST = 1 / 32
# Attention takes packed rows apart, each with its prompt: so many times the token budget at most, without padding
APART = 4
# What losses see are rows padded to the longest: so many times the token budget at most
PADDED = 16
# What one more run of rows costs attention, in tokens: on two CPU cores 32 to 128 were equally good on five mixes
RUN_COST = 64

Runs = tuple[tuple[int, int], ...]  # rows, and the length to which they are padded, of each run of them
Unit = tuple[Sample, ...]  # samples that go into one micro-batch together
Asked = tuple[tuple[int, ...], tuple[Media, ...]]


def make_batch(
    samples: Sequence[Sample],
    ranks: int,
    token_budget: int,
    index: int = 0,
    packed: bool = False,
    image_token: int | None = None,
) -> Batch:
    """Cut the samples of optimizer step `index` over `ranks` ranks, balanced by tokens and, where `image_token` is the
    id that stands for them, by visual tokens (SAIL-VL2, visual packing); each rank into micro-batches of at most
    token_budget tokens. `packed`: without padding, and a prompt that several samples share counts once, since they stay
    together; else rows × longest row, longest first, with little padding.

    Every rank has the same number of micro-batches; one that ran out gets empty ones. Rows of weight 0 are kept (they
    cost a forward pass, and their place must not depend on the weight) but count in no denominator.
    Raises ValueError without samples or ranks, and for a sample longer than the budget or without completion, by name.
    """
    if ranks < 1 or not samples:
        raise ValueError(f"a batch needs at least one rank and one sample, got {ranks} and {len(samples)}")
    for sample in samples:
        _require_trainable(sample, token_budget)
    # no rank has to wait for one that holds a whole family
    share = math.ceil(sum(map(_length, samples)) / ranks)
    units = _families(samples, token_budget, share) if packed else [(sample,) for sample in samples]
    units.sort(key=_tokens, reverse=True)
    shares = _share_out(units, ranks, image_token)
    if packed:
        cut = [_fill(share, token_budget) for share in shares]
    else:
        cut = [_cut([sample for unit in share for sample in unit], token_budget) for share in shares]
    depth = max(map(len, cut))
    counted = [sample for sample in samples if sample.weight != 0]
    return Batch(
        micro_batches=tuple(tuple(mine + [()] * (depth - len(mine))) for mine in cut),
        num_tokens=sum(sample.num_learned for sample in counted),
        num_rows=len(counted),
        index=index,
    )


def _share_out(units: Sequence[Unit], ranks: int, image_token: int | None) -> list[list[Unit]]:
    """The units of each rank, in their order. The vision encoder works on pictures, the decoder on all tokens, and a
    rank that has more of either is waited for."""
    found = np.array([(_tokens(unit), unit[0].token_ids.count(image_token)) for unit in units], dtype=np.float64)
    sizes = found / np.maximum(found.sum(0), 1)  # of all tokens, and of all visual tokens
    loads = np.zeros((ranks, 2))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    # Largest first, to the rank where it adds least to the sum of squares of both loads: with one kind the least
    # loaded, within 4/3 of the best balance (Graham 1969)
    for place in np.argsort(-sizes.max(1), kind="stable"):
        rank = int(np.argmin(loads @ sizes[place]))
        shares[rank].append(int(place))
        loads[rank] += sizes[place]
    return [[units[place] for place in sorted(mine)] for mine in shares]


def _families(samples: Sequence[Sample], token_budget: int, share: int) -> list[Unit]:
    """Samples that share a prompt, together as far as the budget goes, and of several ranks a rank's share."""
    families: dict[Asked, list[Unit]] = {}
    alone = [(sample,) for sample in samples if sample.skipped]  # their pictures may stand after the prompt
    for sample in samples:
        if sample.skipped:
            continue
        units = families.setdefault(asked(sample), [])
        grown = (*units[-1], sample) if units else (sample,)
        if len(grown) > 1 and (sum(map(_length, grown)) > share or not _fits(grown, _tokens(grown), token_budget)):
            units.append((sample,))
        else:
            units[max(len(units) - 1, 0) :] = [grown]
    return [*alone, *(unit for units in families.values() for unit in units)]


def _fits(rows: Unit, tokens: int, token_budget: int) -> bool:
    lengths = [_length(row) for row in rows]
    padded = len(rows) * max(lengths)
    return tokens <= token_budget and sum(lengths) <= APART * token_budget and padded <= PADDED * token_budget


def asked(sample: Sample) -> Asked:
    """The sample's prompt: rows for which this is equal compute the same up to their completions."""
    return sample.token_ids[: sample.prompt_length], sample.media


def _tokens(unit: Unit) -> int:
    """Of samples with one prompt, which counts once."""
    return unit[0].prompt_length + sum(sample.num_completion for sample in unit)


def _require_trainable(sample: Sample, token_budget: int) -> None:
    length = len(sample.token_ids)
    if length > token_budget:
        raise ValueError(
            f"sample {sample.key} has {length} tokens, more than the token budget of {token_budget}: raise "
            "resources.token_budget or leave the row out"
        )
    if not 1 <= sample.prompt_length < length:
        raise ValueError(
            f"sample {sample.key} has a prompt of {sample.prompt_length} tokens out of {length}: "
            "both the prompt and the completion need at least one"
        )
    for name in ("logprobs", "advantages", "returns"):
        if (given := len(getattr(sample, name))) not in (0, sample.num_completion):
            raise ValueError(f"sample {sample.key} has {given} {name} for {sample.num_completion} completion tokens")


def _fill(units: Sequence[Unit], token_budget: int) -> list[tuple[Sample, ...]]:
    """Micro-batches of units already sorted longest first: each into the first that has room (within 11/9 of the
    fewest, Johnson 1973). Rows longest first: attention takes runs of like length."""
    parts: list[Unit] = []
    loads: list[int] = []
    for unit in units:
        needed = _tokens(unit)
        for place, (part, load) in enumerate(zip(parts, loads, strict=True)):
            if _fits(part + unit, load + needed, token_budget):
                parts[place] += unit
                loads[place] += needed
                break
        else:
            parts.append(unit)
            loads.append(needed)
    return [tuple(sorted(part, key=_length, reverse=True)) for part in parts]


def _cut(samples: Sequence[Sample], token_budget: int) -> list[tuple[Sample, ...]]:
    """Micro-batches of samples already sorted longest first: the first row of each sets its padded length."""
    cut = _runs([_length(sample) for sample in samples], token_budget * CALL_COST, token_budget)
    return [tuple(samples[start:end]) for start, end in pairwise((0, *accumulate(rows for rows, _ in cut)))]


def _runs(lengths: Sequence[int], cost: float, most: float = math.inf) -> Runs:
    """Rows in their order cut into runs, each padded to its longest and of at most `most` tokens, padding included: of
    all such cuts the one with the fewest padded tokens, a run more being as dear as `cost` of them."""
    found = np.asarray(lengths)
    cheapest = np.zeros(len(lengths) + 1)  # [end]: what the first `end` rows cost
    starts = [0]
    for end in range(1, len(lengths) + 1):
        first = max(0, end - int(min(end, most / found[end - 1])))  # more rows as long as the last do not fit
        longest = np.maximum.accumulate(found[first:end][::-1])[::-1]
        padded = np.arange(end - first, 0, -1) * longest
        costs = np.where(padded <= most, cheapest[first:end] + padded + cost, math.inf)
        starts.append(first + int(costs.argmin()))
        cheapest[end] = costs[starts[end] - first]
    runs: list[tuple[int, int]] = []
    end = len(lengths)
    while end:
        runs.append((end - starts[end], max(lengths[starts[end] : end])))
        end = starts[end]
    return tuple(runs[::-1])


def _length(sample: Sample) -> int:
    return len(sample.token_ids)


@dataclass(frozen=True)
class Packing:
    """How the model sees B padded rows as N tokens end to end, a prompt that several rows share only once.

    places  [B, L] which of the N tokens stands there; 0 on padding
    owned   [B, L] True where the row brings the token; in row-major order these are the N
    runs    rows in their order cut into runs of like length; attention pads a run to its longest
    """

    places: Tensor
    owned: Tensor
    runs: Runs

    def apart(self) -> dict[str, Any]:
        """Keyword arguments of `by_row`: row_places [M] is `places` run after run, each up to its length; row_owned [N]
        are those of the M that are owned; row_runs the runs."""
        ends = tuple(accumulate(rows for rows, _ in self.runs))
        cuts = [(slice(end - rows, end), slice(length)) for end, (rows, length) in zip(ends, self.runs, strict=True)]
        places, owned = (torch.cat([part[cut].flatten() for cut in cuts]) for part in (self.places, self.owned))
        return {"row_places": places, "row_owned": owned.nonzero()[:, 0], "row_runs": self.runs}

    def to(self, device: str | torch.device) -> Packing:
        return replace(self, places=self.places.to(device), owned=self.owned.to(device))


@dataclass(frozen=True)
class Tensors:
    """One micro-batch of B rows padded on the right to L tokens, as losses see it; the model sees them so too, or
    packed, as N tokens.

    input_ids       [B, L]
    attention_mask  [B, L] 1 on tokens, 0 on padding
    position_ids    [B, L], or position rows [3, B, L] (`rlhf.bridge.positions`); None where the model computes its own
    media           what else the model's forward takes, by its own argument names (pixel_values, …)
    mask            [B, L − 1] the row's weight where token t + 1 is a completion token, 0 elsewhere
    old_logprobs    [B, L − 1] of token t + 1 under the sampling policy; 0 where unknown
    advantages      [B, L − 1] of token t + 1
    returns         [B, L − 1] what a critic should say of token t + 1; 0 where unknown
    weights         [B]
    completion      [B, L − 1] True where token t + 1 is a completion token and not skipped, whatever the row's weight
    sampled         [B] True where the row came with log-probabilities, of the weights that the step starts from
    packing         how the model sees them; None: as they are
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    media: Mapping[str, Tensor]
    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    completion: Tensor
    sampled: Tensor
    packing: Packing | None = None

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        if self.packing is None:
            inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.media}
            return inputs if self.position_ids is None else {**inputs, "position_ids": self.position_ids}
        assert self.position_ids is not None
        return {
            "input_ids": self.given_ids()[None],
            "position_ids": self.position_ids[..., self.packing.owned].unsqueeze(-2),
            **self.packing.apart(),
            **self.media,
        }

    def given_ids(self) -> Tensor:
        """[N or B · L] the ids that the model gets, one after the other."""
        return self.input_ids.flatten() if self.packing is None else self.input_ids[self.packing.owned]

    def seen(self) -> Tensor:
        """[N or B · L] how many rows of weight see each token that the model gets; 0 on padding."""
        sees = (self.attention_mask > 0) & (self.weights > 0)[:, None]
        if self.packing is None:
            return sees.long().flatten()
        return torch.bincount(self.packing.places[sees], minlength=int(self.packing.owned.sum()))

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Which positions of the model's input need logits [kept], at least one, and for every completion token, in
        the order of `completion`'s Trues, which of those logits predicts it, rows end to end."""
        where = self.completion.nonzero()  # [tokens, 2]
        kept, column = self._kept(where[:, 0], where[:, 1])
        return (kept if len(kept) else kept.new_zeros(1)), column

    def replies(self) -> tuple[Tensor, Tensor]:
        """The same of the completion tokens themselves: what the model gives where they are, which has read them."""
        where = self.completion.nonzero()  # [tokens, 2]
        kept, column = self._kept(where[:, 0], where[:, 1] + 1)
        return (kept if len(kept) else kept.new_zeros(1)), column

    def ends(self) -> tuple[Tensor, Tensor]:
        """The same of every row's last token: which positions of the model's input [kept], and for each of the B rows
        which of what the model gives there, rows end to end, is of its last token."""
        last = self.attention_mask.sum(1) - 1
        return self._kept(torch.arange(len(last), device=last.device), last)

    def _kept(self, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Of places in rows: the positions of the model's input where they are, each once, and for every place which of
        these is its, rows end to end."""
        if self.packing is not None:
            position, row = self.packing.places[row, position], torch.zeros_like(row)
        kept, column = position.unique(return_inverse=True)
        return kept, row * len(kept) + column

    def in_rows(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[B, L, …] of what the model gave its tokens one after the other [N or B · L, …]; packed, with `fill` on
        padding."""
        if self.packing is None:
            return values.reshape(*self.input_ids.shape, *values.shape[1:])
        found = values[self.packing.places.to(values.device)]
        found[self.attention_mask.to(values.device) == 0] = fill
        return found

    def to(self, device: str | torch.device) -> Tensors:
        """The same micro-batch on another device."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = value.to(device)
        if self.packing is not None:
            moved["packing"] = self.packing.to(device)
        return replace(self, **moved, media={name: value.to(device) for name, value in self.media.items()})


class Visual(Protocol):
    """What differs between families of models: how media become tensors of the forward pass."""

    pad_id: int
    packs: bool  # the model takes rows end to end (`Packing`)
    reads: bool  # what becomes of a picture depends on what is asked beside it

    def read(self, media: Media) -> Mapping[str, Tensor]:
        """Tensors of one media item. Raises ValueError if its bytes cannot be decoded."""

    def join(self, items: Sequence[Mapping[str, Tensor]], input_ids: Tensor) -> dict[str, Tensor]:
        """Tensors of a micro-batch from those of its items, in row order, and its input_ids [B, L]."""

    def positions(self, input_ids: Tensor) -> Tensor | None:
        """Those of padded input_ids [B, L] as the model's forward takes them; None where it computes its own."""

    def blank(self) -> Sample | None:
        """A row with a picture to add, at weight 0, to a micro-batch without media, so that every rank runs the
        vision tower; None for a model whose own forward sees to that."""


class BridgeVisual:
    """Media of a think-fusion bridge: what `BridgeModel.get_image_features` takes. The model itself runs a zero-weight
    vision pass on text-only rows."""

    def __init__(self, processor: Any, packs: bool = False) -> None:
        self._processor = processor
        self.packs = packs
        self.reads = processor.reads
        self.pad_id = pad_of(processor.tokenizer)

    def read(self, media: Media) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self._processor.image_inputs([media.open()])
        return found

    def join(self, items: Sequence[Mapping[str, Tensor]], input_ids: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return concatenate(items)

    def positions(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self._processor.positions(input_ids)
        return found

    def blank(self) -> Sample | None:
        return None


class Cached:
    """A Visual that remembers the last `size` media items by their digest: the rollouts of a group share
    a picture, and small data comes round again."""

    def __init__(self, visual: Visual, size: int = 512) -> None:
        self._visual = visual
        self._size = size
        self._items: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()
        self.pad_id = visual.pad_id
        self.packs = visual.packs
        self.reads = visual.reads

    def read(self, media: Media) -> Mapping[str, Tensor]:
        digest = media.digest(self.reads)
        if digest in self._items:
            self._items.move_to_end(digest)
            return self._items[digest]
        item = self._visual.read(media)
        self._items[digest] = item
        if len(self._items) > self._size:
            self._items.popitem(last=False)
        return item

    def join(self, items: Sequence[Mapping[str, Tensor]], input_ids: Tensor) -> dict[str, Tensor]:
        return self._visual.join(items, input_ids)

    def positions(self, input_ids: Tensor) -> Tensor | None:
        return self._visual.positions(input_ids)

    def blank(self) -> Sample | None:
        return self._visual.blank()


def pad_of(tokenizer: Any) -> int:
    """The tokenizer's padding id; end-of-text, then 0, where it has none. Never read by the model: it is masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def concatenate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join tensors of the same name along their first dimension."""
    if not items:
        return {}
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def collate(samples: Sequence[Sample], visual: Visual) -> Tensors:
    """Tensors of one micro-batch. An empty one becomes a dummy row of weight 0, so that every rank runs the same
    forwards. Raises ValueError naming the sample whose media cannot be read."""
    rows = list(samples)
    if not any(row.media for row in rows) and (blank := visual.blank()) is not None:
        rows.append(replace(blank, weight=0.0))
    if not rows:
        rows.append(Sample("dummy", (visual.pad_id, visual.pad_id), prompt_length=1, weight=0.0))
    length = max(map(_length, rows))
    shape = (len(rows), length)
    input_ids = torch.full(shape, visual.pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    completion = torch.zeros((len(rows), length - 1), dtype=torch.bool)
    of_tokens = {name: torch.zeros((len(rows), length - 1)) for name in ("logprobs", "advantages", "returns")}
    of_tokens["advantages"] += torch.tensor([row.advantage for row in rows])[:, None]
    for index, row in enumerate(rows):
        end = len(row.token_ids)
        input_ids[index, :end] = torch.tensor(row.token_ids)
        attention_mask[index, :end] = 1
        completion[index, row.prompt_length - 1 : end - 1] = True
        for first, after in row.skipped:
            completion[index, first - 1 : after - 1] = False
        for name, values in of_tokens.items():
            if given := getattr(row, name):
                values[index, row.prompt_length - 1 : end - 1] = torch.tensor(given)
    # rows added here are no part of the step: no completion token of theirs is measured
    completion[len(samples) :] = False
    weights = torch.tensor([row.weight for row in rows])
    packing, bringers = (None, range(len(rows))) if not visual.packs else _pack(rows, attention_mask)
    return Tensors(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=visual.positions(input_ids),
        media=visual.join([read_media(rows[i], item, visual) for i in bringers for item in rows[i].media], input_ids),
        mask=completion * weights[:, None],
        old_logprobs=of_tokens.pop("logprobs"),
        **of_tokens,
        weights=weights,
        completion=completion,
        sampled=torch.tensor([bool(row.logprobs) and row.current for row in rows]),
        packing=packing,
    )


def _pack(rows: Sequence[Sample], attention_mask: Tensor) -> tuple[Packing, Sequence[int]]:
    """The packing of padded rows, and the rows that bring their prompt: the first of those that share it."""
    firsts: dict[Asked, int] = {}
    # of a conversation pictures may stand after the first reply, so that it shares nothing
    bringer = [index if row.skipped else firsts.setdefault(asked(row), index) for index, row in enumerate(rows)]
    owned = attention_mask.bool()
    for index, row in enumerate(rows):
        if bringer[index] != index:
            owned[index, : row.prompt_length] = False
    places = torch.zeros_like(attention_mask)
    places[owned] = torch.arange(int(owned.sum()))
    for index, row in enumerate(rows):
        if bringer[index] != index:
            places[index, : row.prompt_length] = places[bringer[index], : row.prompt_length]
    return Packing(places, owned, _runs([_length(row) for row in rows], RUN_COST)), list(dict.fromkeys(bringer))


def read_media(row: Sample, item: Media, visual: Visual) -> Mapping[str, Tensor]:
    """Tensors of one of the row's media. Raises ValueError naming the row if it cannot be read."""
    try:
        return visual.read(item)
    except (OSError, ValueError) as error:
        raise ValueError(f"sample {row.key}: its {item.kind} cannot be read ({error}); fix or drop the row") from error
