"""What a cluster is to us: something that takes a job, tells its state, hands out what it printed, and ends it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Protocol

from actors.jobs.record import JobError
from actors.jobs.ticket import Ticket
from rlhf.recipe import NodesTable, Recipe

__all__ = ["Backend", "JobError", "State", "UnknownJobError", "machines_of"]


def machines_of(ticket: Ticket) -> list[NodesTable]:
    """The kinds of machine that a job gets, at least one. Raises JobError where [cluster] names none."""
    if not ticket.cluster.nodes:
        raise JobError(
            "[[cluster.nodes]] is not given: say how many machines with which cores, memory and GPUs it gets"
        )
    return ticket.cluster.nodes


class State(Enum):
    """Of a job. PREEMPTED: it was told to go, left a checkpoint, and asks to be submitted again."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    PREEMPTED = "preempted"

    @property
    def ended(self) -> bool:
        return self not in (State.WAITING, State.RUNNING)


class UnknownJobError(JobError):
    """A cluster that has no such job: it has forgotten it, or was never given it. `state`: of one that was given it."""

    def __init__(self, said: str, state: State = State.FAILED) -> None:
        super().__init__(said)
        self.state = state


class Backend(Protocol):
    """One kind of cluster. Every call may raise JobError, and none waits without a deadline."""

    def render(self, ticket: Ticket, recipe: Recipe) -> str:
        """Exactly what `submit` would hand over, as text; nothing is started or written."""
        ...

    def submit(self, ticket: Ticket, recipe: Recipe) -> str:
        """Hand the job over; returns what the cluster calls it (`Ticket.native`). An `unanswered` JobError says that it
        perhaps was."""
        ...

    def state(self, ticket: Ticket) -> tuple[State, str]:
        """How it stands with the job, and why, in words ("" where there is nothing to add). Raises UnknownJobError
        where nothing is known of it, as of one that is on its way."""
        ...

    def logs(self, ticket: Ticket, follow: bool) -> Iterator[str]:
        """What the job printed, in pieces; with `follow` what it prints until it ends."""
        ...

    def stop(self, ticket: Ticket) -> None:
        """End the job as a preemption would, with time for a checkpoint, and wait for its end."""
        ...
