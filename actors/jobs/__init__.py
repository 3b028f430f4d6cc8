"""Curricula as jobs of a cluster: submit, status, logs, stop, resubmit, list; by ticket to the cluster it went to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from actors.jobs import ticket as tickets
from actors.jobs.backend import Backend, JobError, State
from actors.jobs.ticket import Ticket
from rlhf.recipe import Recipe

__all__ = [
    "Found",
    "JobError",
    "State",
    "Ticket",
    "list_jobs",
    "logs",
    "render",
    "resubmit",
    "status",
    "stop",
    "submit",
    "ticket_of",
]


@dataclass(frozen=True)
class Found:
    """A job as its cluster tells of it; `state` is None where the cluster cannot be asked, and `why` says so."""

    ticket: Ticket
    state: State | None
    why: str

    def __str__(self) -> str:
        return f"{self.ticket.job}: {self.word}" + (f" ({self.why})" if self.why else "")

    @property
    def ended(self) -> bool:
        return self.state is not None and self.state.ended

    @property
    def word(self) -> str:
        return "unknown" if self.state is None else self.state.value


def backend(ticket: Ticket, runs: Path, port: int | None = None) -> Backend:
    """Whatever the ticket's job was, or is to be, sent to; `runs`: where run folders lie here; `port`: of a Ray head
    that has to be started for it."""
    if ticket.cluster.to == "ray":
        from actors.jobs.ray_cluster import RayCluster

        return RayCluster(runs, port)
    if ticket.cluster.to == "kuberay":
        from actors.jobs.kuberay import KubeRay

        return KubeRay()
    from actors.jobs.slurm import Slurm

    return Slurm()


def submit(ticket: Ticket, recipe: Recipe, runs: Path, port: int | None = None) -> Ticket:
    """Hand a new ticket's job over, and keep the ticket in `runs`; returns it with its native name."""
    try:
        tickets.keep(ticket, runs)  # before anything runs that nobody could find again
        ticket = replace(ticket, native=backend(ticket, runs, port).submit(ticket, recipe))
        tickets.keep(ticket, runs)
    except OSError as error:
        started = f"; the job runs as {ticket.native!r}" if ticket.native else ""
        raise JobError(f"{runs / tickets.FOLDER}: no ticket can be kept there ({error}){started}") from error
    except BaseException:
        tickets.drop(ticket, runs)
        raise
    return ticket


def render(ticket: Ticket, recipe: Recipe, runs: Path) -> str:
    """Exactly what `submit` would hand over."""
    return backend(ticket, runs).render(ticket, recipe)


def resubmit(job: str, recipe: Recipe, runs: Path, port: int | None = None) -> Ticket:
    """Submit the same again under a new name: it continues the run folder. `recipe`: read anew from the ticket's files.

    Raises JobError while the job has not ended.
    """
    old = ticket_of(job, runs)
    state, _ = backend(old, runs).state(old)
    if not state.ended:
        raise JobError(f"job {job!r} is {state.value}, and two cannot share its run folder; `rlhf stop {job}` ends it")
    return submit(old.again(), recipe, runs, port)


def status(job: str, runs: Path) -> Found:
    """How it stands with a job."""
    ticket = ticket_of(job, runs)
    return Found(ticket, *backend(ticket, runs).state(ticket))


def logs(job: str, runs: Path, follow: bool = False) -> Iterator[str]:
    """What the job printed so far; with `follow` what it prints until it ends."""
    ticket = ticket_of(job, runs)
    return backend(ticket, runs).logs(ticket, follow)


def stop(job: str, runs: Path) -> Found:
    """Stop the job, and wait for its end."""
    ticket = ticket_of(job, runs)
    backend(ticket, runs).stop(ticket)
    return Found(ticket, *backend(ticket, runs).state(ticket))


def list_jobs(runs: Path) -> list[Found]:
    """Every job that was submitted from here, the oldest first."""
    found = []
    for ticket in _all(runs):
        try:
            found.append(Found(ticket, *backend(ticket, runs).state(ticket)))
        except JobError as error:
            found.append(Found(ticket, None, str(error)))
    return found


def ticket_of(job: str, runs: Path) -> Ticket:
    """The ticket of that name. Raises JobError that names those there are."""
    try:
        ticket = tickets.find(job, runs)
    except ValueError as error:
        raise JobError(str(error)) from error
    if ticket is None:
        known = [other.job for other in _all(runs)]
        there = f"the latest are {', '.join(known[-3:])}" if known else "none was submitted from here"
        raise JobError(f"{runs / tickets.FOLDER} has no job {job!r}; {there}; --runs names another folder")
    return ticket


def _all(runs: Path) -> list[Ticket]:
    try:
        return tickets.find_all(runs)
    except ValueError as error:
        raise JobError(str(error)) from error
