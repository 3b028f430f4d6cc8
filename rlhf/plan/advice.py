"""With what a recipe would fit that does not: its neighbours are planned, and the mildest that fits is told.

One of [resources] alone, if one will do; else as few and as mild as they come; else more nodes of the same kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.plan.cluster import Cluster
from rlhf.plan.types import Plan, PlanError
from rlhf.recipe import Recipe

Trial = Callable[[Recipe, Cluster], Plan]  # raises PlanError where it does not fit
Values = Mapping[str, Any]  # of [resources]
MOST_NODES = 64
LEAST_SEQUENCES, LEAST_CACHE_GIB = 16, 0.25
COMBINED = ("tensor_parallel", "trainer_ranks", "transport", "offload")  # more of one may leave no room for another


@dataclass(frozen=True)
class Needs:
    """Of a recipe: engines and reward models of the whole curriculum where the policy has one engine; GiB of the keys
    and values of a longest row on one GPU; and the numbers of trainer ranks that its batches divide into."""

    served: int
    row_gib: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Advice:
    """`changes`: overrides of the recipe with which it fits on `nodes` nodes; none and 0 where nothing was found."""

    changes: tuple[str, ...]
    nodes: int
    text: str

    def __str__(self) -> str:
        return self.text


def advice(recipe: Recipe, cluster: Cluster, needs: Needs, trial: Trial) -> Advice:
    """What would fit, of a recipe that `trial` refuses on this cluster."""
    here = _Search(recipe, cluster, needs, trial)
    found = here.alone()
    found = here.together() if found is None else found
    if found is not None:
        return here.told(found)
    kind = max(cluster.nodes, key=lambda node: (node.gpus * (node.gpu_memory_gib or 1), node.memory_gib))

    def grown(number: int) -> _Search:
        return _Search(recipe, Cluster((*cluster.nodes, *[kind] * number)), needs, trial)

    more = _least(lambda number: grown(number).together())
    if more is not None:
        search = grown(more)
        found = search.together()
        assert found is not None
        return search.told(found, f"on {len(cluster.nodes) + more} nodes, {more} more like the largest,")
    search = grown(MOST_NODES)
    search.together()
    text = f"nothing in [resources] would make it fit, nor would {MOST_NODES} nodes more like the largest; even then:"
    return Advice((), 0, f"{text} {search.refusal}")


def _least(fits: Callable[[int], object]) -> int | None:
    """The least number from 1 to MOST_NODES that fits, if whatever is above it does, too."""
    high = 1
    while fits(high) is None:
        high *= 2
        if high > MOST_NODES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) is not None else (middle, high)
    return high


class _Search:
    """The neighbours of one recipe on one cluster."""

    def __init__(self, recipe: Recipe, cluster: Cluster, needs: Needs, trial: Trial) -> None:
        self.recipe, self.cluster, self._needs, self._trial = recipe, cluster, needs, trial
        self._given = recipe.resources
        self.refusal = ""  # of what was tried last
        self._ladders = dict(self._ladder())

    def alone(self) -> dict[str, Any] | None:
        """The change of one value, or of none but memory_gib, that fits."""
        if self._plan({}) is not None:
            return {}
        for name, values in self._ladders.items():
            for value in values:
                if self._plan({name: value}) is not None:
                    return {name: value}
        return None

    def together(self) -> dict[str, Any] | None:
        """The mildest changes of several values that fit."""
        for corner in self._corners():
            if self._plan(corner) is not None:
                return self._relaxed(corner)
        return None

    def told(self, found: Values, where: str = "") -> Advice:
        """In words, with what the processes need then."""
        plan, changes = self._plan(found), dict(found)
        assert plan is not None
        if plan.memory.together > self._given.memory_gib:
            changes["memory_gib"] = math.ceil(plan.memory.together)
        overrides = tuple(f"resources.{name} = {json.dumps(value)}" for name, value in changes.items())
        needs = [f"all hosts {plan.memory.together:.1f} GiB"]
        if self._given.device == "cuda":
            fullest = max(need for node in plan.nodes for need in node.gpus)
            engine = [f"of an engine {plan.memory.engine:.1f}"] if plan.memory.engine else []
            shared = [f"the fullest {fullest:.1f}"] if plan.colocated else []
            needs = [f"the GPU of a trainer rank needs {plan.memory.trainer:.1f} GiB then", *engine, *shared, *needs]
        words = [where, f"with {' and '.join(overrides)}" if overrides else "", "it would fit"]
        return Advice(overrides, len(self.cluster.nodes), f"{' '.join(filter(None, words))}: {', '.join(needs)}")

    def _plan(self, changes: Values) -> Plan | None:
        # what a recipe allows of the host may be raised to what there is
        allowed = max(self._given.memory_gib, self.cluster.memory_gib)
        resources = self._given.model_copy(update={**changes, "memory_gib": allowed})
        try:
            return self._trial(self.recipe.model_copy(update={"resources": resources}), self.cluster)
        except PlanError as error:
            self.refusal = str(error).splitlines()[0]
            return None

    def _ladder(self) -> Iterator[tuple[str, list[Any]]]:
        """Of each value those it may take in the place of its own, mildest first; the names in the order in which one
        would rather change them."""
        r, cuda = self._given, self._given.device == "cuda"
        rows, most = r.max_model_len, self.cluster.most_gpus if cuda else 1
        yield "checkpointing", [True] if not r.checkpointing else []
        yield "zero_stage", list(range(max(r.zero_stage, 1) + 1, 4)) if r.trainer_ranks > 1 or cuda else []
        yield "transport", (["shm"] if len(self.cluster.nodes) == 1 else ["cpu"]) if cuda else []
        ranks = [n for n in self._needs.ranks if n <= self.cluster.gpus]
        more, fewer = [n for n in ranks if n > r.trainer_ranks], [n for n in ranks if n < r.trainer_ranks]
        yield "trainer_ranks", [*more, *fewer[::-1]]
        wider = [n for n in (2, 4, 8, 16) if r.tensor_parallel < n <= most]
        yield "tensor_parallel", [*wider, *_halvings(r.tensor_parallel, 1)]
        yield "offload", [True] if cuda and not r.offload else []
        yield "kv_cache_gib", _caches(r.kv_cache_gib, self._needs.row_gib)
        yield "token_budget", _halvings(r.token_budget, rows)
        yield "max_num_seqs", _halvings(r.max_num_seqs, LEAST_SEQUENCES)
        yield "rollout_workers", _halvings(r.rollout_workers, 1)

    def _corners(self) -> Iterator[dict[str, Any]]:
        """Every value at its end, but for those whose ends hinder one another all combinations of these."""
        r, ladders = self._given, self._ladders
        ends = {name: values[-1] for name, values in ladders.items() if values and name not in COMBINED}
        for parallel in (r.tensor_parallel, *ladders["tensor_parallel"]):
            spare = self.cluster.gpus - self._needs.served * parallel
            others = sorted(ladders["trainer_ranks"])
            alone = [number for number in others if number <= spare]  # a GPU for each process
            for ranks in dict.fromkeys((r.trainer_ranks, *alone[-1:], *others[-1:])):
                for transport in (r.transport, *ladders["transport"]):
                    for offload in (r.offload, *ladders["offload"]):
                        yield ends | dict(zip(COMBINED, (parallel, ranks, transport, offload), strict=True))

    def _relaxed(self, changes: dict[str, Any]) -> dict[str, Any]:
        """`changes` that fit, each taken back as far as they still do; what one would rather not change first."""
        for name in reversed(self._ladders):
            if name not in changes:
                continue
            rest = {other: value for other, value in changes.items() if other != name}
            mildest = getattr(self._given, name)
            if changes[name] == mildest or self._plan(rest) is not None:
                changes = rest
                continue
            values = self._ladders[name]
            for value in values[: values.index(changes[name])]:
                if self._plan({**rest, name: value}) is not None:
                    changes = {**rest, name: value}
                    break
        return {name: changes[name] for name in self._ladders if name in changes}


def _halvings(value: float, least: float) -> list[int]:
    """Half of it, half of that, … down to `least` and no less."""
    found, half = [], int(value)
    while half > least:
        half = max(int(least), half // 2)
        found.append(half)
    return found


def _caches(given: float, row_gib: float) -> list[float]:
    """Sizes of a cache to take in the place of the given, mildest first: what holds a longest row, if that does not;
    else smaller ones that still do."""
    least = max(LEAST_CACHE_GIB, math.ceil(4 * row_gib) / 4)
    if given < least:
        return [least]
    found, half = [], given
    while half > least:
        half = max(least, math.floor(2 * half) / 4)
        found.append(half)
    return found
