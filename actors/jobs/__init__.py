"""Curricula as jobs of a cluster: submit, status, logs, stop, resubmit, list; by ticket to the cluster it went to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from actors.jobs import ticket as tickets
from actors.jobs.backend import Backend, JobError, State, UnknownJobError
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
    """A job as its cluster, `to`, tells of it ("" where its ticket cannot be read); `state` is None where the cluster
    cannot be asked, and `why` says so."""

    job: str
    to: str
    state: State | None
    why: str

    def __str__(self) -> str:
        return f"{self.job}: {self.word}" + (f" ({self.why})" if self.why else "")

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
    """Hand a new ticket's job over, and keep the ticket in `runs`; returns it with its native name.

    Raises JobError where it is not handed over, and while another job has the run folder. Of a job that was perhaps
    handed over the ticket stays, without a native name; KeyboardInterrupt, too, then says how to look for it.
    """
    _keep(ticket, runs)  # first: another submit at the same time sees it, and what runs can be found again
    try:
        _require_alone(ticket, runs)
    except BaseException:
        tickets.drop(ticket, runs)
        raise
    try:
        native = backend(ticket, runs, port).submit(ticket, recipe)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_perhaps(ticket, runs)) from error
    except JobError as error:
        if error.unanswered:
            raise JobError(f"{error}; {_perhaps(ticket, runs)}") from error
        tickets.drop(ticket, runs)
        raise
    except OSError as error:
        tickets.drop(ticket, runs)
        raise JobError(f"the job was not submitted: {error}") from error
    except BaseException:
        tickets.drop(ticket, runs)
        raise
    ticket = replace(ticket, native=native)
    _keep(ticket, runs)
    return ticket


def render(ticket: Ticket, recipe: Recipe, runs: Path) -> str:
    """Exactly what `submit` would hand over."""
    return backend(ticket, runs).render(ticket, recipe)


def resubmit(job: str, recipe: Recipe, runs: Path, port: int | None = None) -> Ticket:
    """Submit the same again under a new name: it continues the run folder. `recipe`: read anew from the ticket's files.

    Raises JobError while the job, or another of its run folder, has not ended.
    """
    return submit(ticket_of(job, runs).again(), recipe, runs, port)


def status(job: str, runs: Path) -> Found:
    """How it stands with a job."""
    ticket = ticket_of(job, runs)
    try:
        state, why = backend(ticket, runs).state(_named(ticket, runs))
    except UnknownJobError as error:
        if not ticket.native:
            raise JobError(_unknown(ticket, error)) from error
        state, why = error.state, _unknown(ticket, error)
    return Found(job, ticket.cluster.to, state, why)


def logs(job: str, runs: Path, follow: bool = False) -> Iterator[str]:
    """What the job printed so far; with `follow` what it prints until it ends."""
    ticket = ticket_of(job, runs)
    try:
        yield from backend(ticket, runs).logs(_named(ticket, runs), follow)
    except UnknownJobError as error:
        raise JobError(_unknown(ticket, error)) from error


def stop(job: str, runs: Path) -> Found:
    """Stop the job, and wait for its end."""
    ticket = ticket_of(job, runs)
    named = _named(ticket, runs)
    with contextlib.suppress(UnknownJobError):  # which has ended, then
        backend(ticket, runs).stop(named)
    if named != ticket:
        _keep(named, runs)  # else it would be taken to be on its way for ever
    return status(job, runs)


def list_jobs(runs: Path) -> list[Found]:
    """Every job that was submitted from here, the oldest first."""
    return [_found(job, runs) for job in tickets.names(runs)]


def ticket_of(job: str, runs: Path) -> Ticket:
    """The ticket of that name. Raises JobError that names those there are."""
    ticket = tickets.find(job, runs)
    if ticket is None:
        known = tickets.names(runs)
        there = f"the latest are {', '.join(known[-3:])}" if known else "none was submitted from here"
        raise JobError(f"{runs / tickets.FOLDER} has no job {job!r}; {there}; --runs names another folder")
    return ticket


def _found(job: str, runs: Path) -> Found:
    """How it stands with a job, whatever can be known of it."""
    try:
        return status(job, runs)
    except JobError as error:
        ticket = _readable(job, runs)
        return Found(job, "" if ticket is None else ticket.cluster.to, None, str(error))


def _readable(job: str, runs: Path) -> Ticket | None:
    try:
        return tickets.find(job, runs)
    except JobError:
        return None


def _require_alone(ticket: Ticket, runs: Path) -> None:
    """Raise JobError while another job has, or may have, the run folder of this one."""
    for job in tickets.names(runs):
        if job == ticket.job or not _may_share(job, ticket, runs):
            continue
        found = _found(job, runs)
        if not found.ended:
            shared = f"job {job!r} is {found.word}, and two cannot share its run folder, {ticket.run_folder[0]}"
            raise JobError(f"{shared}; {_way_out(found, tickets.path_of(job, runs))}")


def _may_share(job: str, ticket: Ticket, runs: Path) -> bool:
    """Whether a job has the run folder of this ticket; one whose own ticket cannot be read may, by its name."""
    try:
        other = tickets.find(job, runs)
    except JobError:
        return tickets.is_name(job, ticket.recipe)
    return other is not None and other.run_folder == ticket.run_folder


def _way_out(found: Found, path: Path) -> str:
    """What to do about a job that has not ended, or whose state is not known; `path`: its ticket's."""
    if found.state is not None:
        return f"`rlhf stop {found.job}` ends it" + (f" ({found.why})" if found.why else "")
    removal = "" if str(path) in found.why else f"; where nothing of it runs, remove {path}"
    return f"{found.why}{removal}"


def _keep(ticket: Ticket, runs: Path) -> None:
    try:
        tickets.keep(ticket, runs)
    except OSError as error:
        started = f"; the job runs as {ticket.native!r}" if ticket.native else ""
        raise JobError(f"{runs / tickets.FOLDER}: no ticket can be kept there ({error}){started}") from error


def _named(ticket: Ticket, runs: Path) -> Ticket:
    """The ticket with what its cluster calls the job, or would call it where it was perhaps handed over.

    Raises JobError where only the cluster knows.
    """
    if ticket.native:
        return ticket
    if ticket.cluster.to == "ray":
        return replace(ticket, native=ticket.job)
    if ticket.cluster.to == "kuberay":
        from actors.jobs.kuberay import name_of

        return replace(ticket, native=name_of(ticket.job))
    raise JobError(_perhaps(ticket, runs))


def _unknown(ticket: Ticket, error: UnknownJobError) -> str:
    """What it means, and what to do, that its cluster does not know a job."""
    job = ticket.job
    if ticket.native:
        return f"{error}; `rlhf resubmit {job}` continues it"
    return f"job {job!r} is being submitted, or was never handed over ({error}); `rlhf stop {job}` gives it up"


def _perhaps(ticket: Ticket, runs: Path) -> str:
    """How to look for a job that was perhaps handed over."""
    job = ticket.job
    if ticket.cluster.to == "slurm":
        look = (
            f"`squeue --name={job}` and `sacct --name={job}` tell, and `scancel --name={job}` ends it; "
            f"where nothing of it runs, remove {tickets.path_of(job, runs)}"
        )
    else:
        look = f"`rlhf status {job}` tells, and `rlhf stop {job}` ends it"
    return f"job {job!r} was perhaps handed over: {look}"
