"""Work beside other work: the first failure ends both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rlhf.tasks import beside, under_way


async def work(said: list[str], fails: bool = False, waits: bool = False) -> int:
    try:
        await (asyncio.Event().wait() if waits else asyncio.sleep(0))
    except asyncio.CancelledError:
        said.append("work ended")
        raise
    if fails:
        raise ValueError("work")
    return 7


@asynccontextmanager
async def context(said: list[str], fails: bool = False, waits: bool = False) -> AsyncIterator[str]:
    try:
        await (asyncio.Event().wait() if waits else asyncio.sleep(0))
    except asyncio.CancelledError:
        said.append("entering ended")
        raise
    if fails:
        raise OSError("context")
    yield "inside"
    said.append("left")


def test_both_are_had_and_the_context_is_left() -> None:
    async def go() -> list[str]:
        said = list[str]()
        async with beside(work(said), context(said)) as (found, inside):
            assert (found, inside) == (7, "inside")
            assert not said
        return said

    assert asyncio.run(go()) == ["left"]


def test_the_first_failure_ends_both() -> None:
    async def go() -> list[str]:
        said = list[str]()
        with pytest.raises(ValueError, match="work"):
            async with beside(work(said, fails=True), context(said, waits=True)):
                pass
        with pytest.raises(OSError, match="context"):
            async with beside(work(said, waits=True), context(said, fails=True)):
                pass
        with pytest.raises(ValueError, match="work"):  # where both failed, what was asked for first
            async with beside(work(said, fails=True), context(said, fails=True)):
                pass
        return said

    assert asyncio.run(asyncio.wait_for(go(), 10)) == ["entering ended", "work ended"]


def test_work_under_way_ends_with_its_block() -> None:
    async def go() -> list[str]:
        said = list[str]()
        async with under_way(work(said, waits=True)) as never:
            await asyncio.sleep(0)
        assert never.cancelled()
        async with under_way(work(said)) as begun:
            assert await begun == 7
        return said

    assert asyncio.run(asyncio.wait_for(go(), 10)) == ["work ended"]
