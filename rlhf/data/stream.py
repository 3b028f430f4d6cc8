"""An endless, weighted, resumable stream over several sources."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

from rlhf.data.rows import DataError, Row, Rows

Drawn = tuple[str, int, Row]  # source, index in the source, row


class Draw(Protocol):
    """What every stream offers: see `Stream`."""

    def take(self, count: int) -> list[Drawn]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


def shares(weights: Mapping[str, float], sizes: Mapping[str, int], mix: str) -> dict[str, float]:
    """How often each source is drawn, relative to the others.

    weights    as the weights say
    size       and in proportion to how many rows it has (w S)
    sqrt_size  and to its square root, so that large ones do not drown small ones (w √S; InstructBLIP 2305.06500)
    loss       all alike: the weights multiply losses instead (`weigh`)
    """
    power = {"weights": 0.0, "size": 1.0, "sqrt_size": 0.5, "loss": 0.0}[mix]
    return {name: 1.0 if mix == "loss" else weight * sizes[name] ** power for name, weight in weights.items()}


class Stream:
    """Mixes sources in exact proportion to their weights: after any n draws each source was drawn within one row of
    its share, times the number of sources. Each source is walked in full, then shuffled anew, by (seed, source, epoch).

    A draw depends on the counts drawn so far and on nothing else, so `state` is those counts.
    Raises DataError for an empty source, a weight without a source, or a weight that is not positive.
    """

    def __init__(self, sources: Mapping[str, Rows], weights: Mapping[str, float], seed: int) -> None:
        if not weights:
            raise DataError("a stream of no sources; give `data` at least one")
        for name, weight in weights.items():
            if name not in sources:
                raise DataError(f"no source named {name!r}; the sources are {', '.join(sources) or 'none'}")
            if len(sources[name]) == 0:
                raise DataError(f"source {name!r} ({sources[name].origin}) has no rows; remove it from `data`")
            if not weight > 0:
                raise DataError(f"source {name!r} has weight {weight}; a weight is above 0")
        total = sum(weights.values())
        self._sources = {name: sources[name] for name in sorted(weights)}
        self._weights = {name: weights[name] / total for name in sorted(weights)}
        self._seed = seed
        self._drawn = dict.fromkeys(self._sources, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def take(self, count: int) -> list[Drawn]:
        """The next `count` rows as (source, index in the source, row)."""
        return [self._next() for _ in range(count)]

    def state(self) -> dict[str, Any]:
        """JSON-able; see `restore`."""
        sizes = {name: len(rows) for name, rows in self._sources.items()}
        return {"seed": self._seed, "weights": dict(self._weights), "sizes": sizes, "drawn": dict(self._drawn)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was taken. Raises DataError if seed, weights, sources or sizes differ."""
        own = self.state()
        for key in ("seed", "weights", "sizes"):
            if state[key] != own[key]:
                raise DataError(f"the stream's {key} changed from {state[key]} to {own[key]}; start the stage anew")
        self._drawn = {name: int(state["drawn"][name]) for name in self._sources}

    def _next(self) -> Drawn:
        turn = sum(self._drawn.values()) + 1
        # the source furthest behind its share; the first by name on a tie
        name = max(self._sources, key=lambda source: self._weights[source] * turn - self._drawn[source])
        epoch, position = divmod(self._drawn[name], len(self._sources[name]))
        index = self._order(name, epoch)[position]
        row = self._sources[name][index]
        self._drawn[name] += 1
        return name, index, row

    def _order(self, name: str, epoch: int) -> list[int]:
        kept = self._orders.get(name)
        if kept is None or kept[0] != epoch:
            order = list(range(len(self._sources[name])))
            random.Random(f"{self._seed}/{name}/{epoch}").shuffle(order)
            kept = self._orders[name] = (epoch, order)
        return kept[1]


class Alike:
    """A stream of which every `take` is of one modality, rows with pictures or rows without, so that a batch's rows are
    of like length (LLaVA-1.5 2310.03744). Over all takes each modality has its share of the rows. Raises DataError as
    `Stream`."""

    def __init__(self, sources: Mapping[str, Rows], weights: Mapping[str, float], seed: int) -> None:
        Stream(sources, weights, seed)  # refuses what cannot be drawn, by name
        self._places: dict[str, dict[str, list[int]]] = {}
        for name in weights:
            for index in range(len(sources[name])):
                kind = "image" if sources[name].bare(index).get("images") else "text"
                self._places.setdefault(kind, {}).setdefault(name, []).append(index)
        self._streams: dict[str, Stream] = {}
        self._shares: dict[str, float] = {}
        for kind, places in sorted(self._places.items()):
            parts = {name: sources[name].select(indexes) for name, indexes in places.items()}
            share = {name: weights[name] * len(part) / len(sources[name]) for name, part in parts.items()}
            self._streams[kind] = Stream(parts, share, seed)
            self._shares[kind] = sum(share.values()) / sum(weights.values())
        self._drawn = dict.fromkeys(self._streams, 0)

    def take(self, count: int) -> list[Drawn]:
        """The next `count` rows as (source, index in the source, row), all of one modality."""
        reached = sum(self._drawn.values()) + count
        kind = max(self._streams, key=lambda kind: self._shares[kind] * reached - self._drawn[kind])
        self._drawn[kind] += count
        places = self._places[kind]
        return [(name, places[name][index], row) for name, index, row in self._streams[kind].take(count)]

    def state(self) -> dict[str, Any]:
        """JSON-able; see `restore`."""
        return {"drawn": dict(self._drawn), "streams": {kind: s.state() for kind, s in self._streams.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was taken. Raises DataError if the data differ."""
        if state["streams"].keys() != self._streams.keys():
            raise DataError("the stream's modalities changed; start the stage anew")
        for kind, stream in self._streams.items():
            stream.restore(state["streams"][kind])
        self._drawn = {kind: int(state["drawn"][kind]) for kind in self._streams}
