"""Machines that are about to go: Ray calls that a drain, and tells who asks."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import placement_group_table

from rlhf.preemption import Preemption
from rlhf.tasks import under_way

POLL_SECONDS = 2.0


@asynccontextmanager
async def watched(group: Any, preemption: Preemption) -> AsyncIterator[None]:
    """While the context lasts, ask for the preemption once a machine that the placement group stands on is drained."""
    async with under_way(_watch(group, preemption)):
        yield


async def _watch(group: Any, preemption: Preemption) -> None:
    ours = set(placement_group_table(group)["bundles_to_node_id"].values())
    warned = False
    while True:
        try:
            drained = await asyncio.to_thread(draining)
        except RayError as error:  # the head is busy, or away for a moment
            if not warned:
                print(f"which machines are drained cannot be asked ({error}); it is asked again")
            drained, warned = {}, True
        if going := ours & drained.keys():
            left = [drained[node] / 1000 - time.time() for node in going if drained[node]]
            return preemption.ask("its machine is drained", max(min(left, default=math.inf), 0.0))
        await asyncio.sleep(POLL_SECONDS)


def draining() -> dict[str, int]:
    """Ids of nodes that are drained (`ray drain-node`, an autoscaler, `ray start --block` after SIGTERM), and when they
    end, in ms since 1970, or 0. Nothing public of Ray 2.60 tells; its own Train asks this."""
    return dict(ray._private.state.state.get_draining_nodes())
