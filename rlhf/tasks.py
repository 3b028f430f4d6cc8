"""Work that goes on beside other work, and is never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


async def ended(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel what is still under way and wait until it is gone."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def under_way(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Begin `work`, to be awaited inside; leaving ends it."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        await ended([task])
