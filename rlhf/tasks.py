"""Work that goes on beside other work, and is never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

S = TypeVar("S")
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


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, T], entered: AbstractAsyncContextManager[S]) -> AsyncIterator[tuple[T, S]]:
    """What `work` gives, and the context that is entered meanwhile; the first failure ends both."""
    async with AsyncExitStack() as stack:
        tasks = asyncio.create_task(work), asyncio.create_task(stack.enter_async_context(entered))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
            found = tasks[0].result(), tasks[1].result()
        finally:
            await ended(tasks)
        yield found
