"""A place in a cluster: whether there can be one, and what is said while there is none."""

from __future__ import annotations

import asyncio

import pytest

from actors import waiting
from actors.handles import ActorTimeoutError
from actors.waiting import free_of, granted, in_words, require_possible
from rlhf.plan import PlanError
from rlhf.plan.cluster import Node

ONE, HALF = {"CPU": 1.0}, {"CPU": 0.5}


def node(cpus: int, gpus: int = 0) -> Node:
    return Node(cpus, 8.0, gpus)


def test_bundles_are_counted() -> None:
    assert in_words([ONE, {"CPU": 0.5, "GPU": 1.0}, ONE]) == "2 × 1 CPU, 1 × 1 GPU + 0.5 CPU"
    assert in_words([{"GPU": 8.0, "CPU": 96.0, "memory": 2e9, "node:10.0.0.1": 1.0}]) == "1 × 8 GPU + 96 CPU"
    assert free_of({"CPU": (0.5, 6.0), "GPU": (0.0, 8.0), "memory": (1, 2)}) == "0 of 8 GPU, 0.5 of 6 CPU are free"


@pytest.mark.parametrize(
    ("bundles", "nodes"),
    [
        ([ONE, ONE, ONE], [node(1), node(2)]),
        ([HALF, ONE, ONE], [node(1), node(2)]),
        ([{"GPU": 1.0, "CPU": 0.6}, ONE], [node(1), node(1, 1)]),
        ([{"CPU": 0.1}] * 10, [node(1)]),  # in binary not quite
    ],
)
def test_what_fits_the_empty_nodes_may_wait(bundles: list[waiting.Bundle], nodes: list[Node]) -> None:
    require_possible(bundles, nodes)


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"the job needs 4 × 0.75 CPU at once, and the nodes of this cluster, 3 × 1 CPU"
    ):
        require_possible([{"CPU": 0.75}] * 4, [node(1)] * 3)  # together they would
    with pytest.raises(PlanError, match=r"1 × 1 GPU \+ 0.5 CPU"):
        require_possible([HALF | {"GPU": 1.0}], [node(1)])


def test_a_wait_is_said_and_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.01)
    monkeypatch.setattr(waiting, "SAYING_SECONDS", 0.01)

    async def work() -> None:
        ready, said = asyncio.get_running_loop().create_future(), list[str]()

        def free() -> str:
            said.append("0 of 1 CPU are free")
            if len(said) == 2:
                ready.set_result(None)
            return said[-1]

        await granted(ready, [ONE], 60.0, free)

    asyncio.run(work())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "waiting for the cluster, 0 s so far: the job needs 1 × 1 CPU at once; 0 of 1 CPU are free"
    assert len(lines) == 2


def test_a_wait_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.01)

    async def work() -> None:
        await granted(asyncio.get_running_loop().create_future(), [ONE], 0.05, lambda: "none")

    with pytest.raises(ActorTimeoutError, match=r"no room for 1 × 1 CPU within 0 s; raise deadlines.queue"):
        asyncio.run(work())
