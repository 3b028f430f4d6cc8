"""A job's place in a cluster: whether there can be one, and the wait for it, which is said."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from actors.handles import ActorTimeoutError
from rlhf.plan import PlanError
from rlhf.plan.cluster import Node
from rlhf.plan.nodes import packed
from rlhf.tracking.console import duration

PATIENCE, SAYING_SECONDS = 10.0, 60.0  # before the first line of a job that waits, and between two
Bundle = Mapping[str, float]  # of resources, by Ray's names: {"CPU": 0.5, "GPU": 1.0}
NAMES = ("GPU", "CPU")


def require_possible(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> None:
    """Raise PlanError when the nodes, with nothing else on them, have no place for all the bundles, as Ray would pack
    them: such a job would wait for ever."""
    if None in packed(bundles, nodes):
        offered = in_words({"CPU": node.cpus, "GPU": node.gpus} for node in nodes)
        raise PlanError(
            f"the job needs {in_words(bundles)} at once, and the nodes of this cluster, {offered}, could not hold that "
            "even if nothing else ran; lower the counts in [resources], or add nodes"
        )


async def granted(ready: Awaitable[Any], bundles: Sequence[Bundle], seconds: float, free: Callable[[], str]) -> None:
    """Wait until a reservation is made, and say now and then what is needed and what is free.

    Raises ActorTimeoutError after `seconds`.
    """
    waiting, started = asyncio.ensure_future(ready), time.monotonic()
    patience = PATIENCE
    while (left := started + seconds - time.monotonic()) > 0:
        done, _ = await asyncio.wait([waiting], timeout=min(patience, left))
        if done:
            waiting.result()
            return
        patience = SAYING_SECONDS
        waited = duration(time.monotonic() - started)
        print(
            f"waiting for the cluster, {waited} so far: the job needs {in_words(bundles)} at once; {free()}", flush=True
        )
    waiting.cancel()
    raise ActorTimeoutError(
        f"the cluster had no room for {in_words(bundles)} within {duration(seconds)}; raise deadlines.queue to wait "
        "longer"
    )


def in_words(bundles: Iterable[Bundle]) -> str:
    """2 × 1 CPU + 1 GPU, 3 × 0.5 CPU"""
    counts = Counter(" + ".join(f"{amount:g} {name}" for name, amount in _named(bundle)) for bundle in bundles)
    return ", ".join(f"{count} × {words}" for words, count in counts.items())


def free_of(resources: Mapping[str, tuple[float, float]]) -> str:
    """0.5 of 6 CPU, 0 of 8 GPU are free; of (free, total) by name"""
    return ", ".join(f"{free:g} of {total:g} {name}" for name, (free, total) in _named(resources)) + " are free"


def _named(resources: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those that a job asks for; Ray counts memory and nodes beside them."""
    return [(name, resources[name]) for name in NAMES if resources.get(name)]
