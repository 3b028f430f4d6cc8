"""An endless, weighted, resumable stream over several sources."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from rlhf.data.rows import DataError, Row, Rows


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

    def take(self, count: int) -> list[tuple[str, int, Row]]:
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

    def _next(self) -> tuple[str, int, Row]:
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
