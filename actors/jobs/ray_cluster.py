"""Jobs of a Ray head, by its Jobs API: one that runs already, or a private one of the runs folder, started here."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobInfo, JobStatus, JobSubmissionClient

from actors.jobs.backend import JobError, State
from actors.jobs.head import DASHBOARD_PORT, HEAD_FOLDER, Head, bearer, find_head, start_head, stop_head
from actors.jobs.ticket import Ticket
from actors.security import JOB_STOP_SECONDS
from rlhf.checkpoint import read_json, write_json, write_text
from rlhf.recipe import Recipe

ANSWER_SECONDS, FOLLOW_SECONDS = 60.0, 2.0
STOP_SECONDS = JOB_STOP_SECONDS + 20.0
ENDED_FOLDER = "ended"  # of a private head: what became of its jobs
STATES = {
    JobStatus.PENDING: State.WAITING,
    JobStatus.RUNNING: State.RUNNING,
    JobStatus.SUCCEEDED: State.SUCCEEDED,
    JobStatus.FAILED: State.FAILED,
    JobStatus.STOPPED: State.STOPPED,
}


class _Client(JobSubmissionClient):
    """Ray's client, which of itself waits for ever, with a deadline for every answer."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer: requests.Response = super()._do_request(method, endpoint, **{"timeout": ANSWER_SECONDS, **options})
        return answer


@dataclass(frozen=True)
class RayCluster:
    """The Ray backend. `port`: of a private head that has to be started.

    A cluster with an address must reach the user's folder at the same path, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH
    must hold its token.
    """

    port: int | None = None

    def render(self, ticket: Ticket, recipe: Recipe) -> str:  # noqa: ARG002
        return _entrypoint(ticket) + "\n"

    def submit(self, ticket: Ticket, recipe: Recipe) -> str:  # noqa: ARG002
        if ticket.cluster.ray.address is None and find_head(_folder(ticket)) is None:
            start_head(_folder(ticket), self.port or DASHBOARD_PORT)
        metadata = {"recipe": ticket.recipe}
        with _client(ticket) as client:
            return str(client.submit_job(entrypoint=_entrypoint(ticket), submission_id=ticket.job, metadata=metadata))

    def state(self, ticket: Ticket) -> tuple[State, str]:
        if _head(ticket) is None and ticket.cluster.ray.address is None:
            return _ended(ticket)
        with _client(ticket) as client:
            return _state(client.get_job_info(ticket.native))

    def logs(self, ticket: Ticket, follow: bool) -> Iterator[str]:
        kept = _folder(ticket) / ENDED_FOLDER / f"{ticket.native}.log"
        if ticket.cluster.ray.address is None and _head(ticket) is None and kept.exists():
            yield kept.read_text()
            return
        shown = 0
        with _client(ticket) as client:
            while True:
                ended = client.get_job_status(ticket.native).is_terminal()  # asked first: what follows is then all
                printed = str(client.get_job_logs(ticket.native))
                yield printed[shown:]
                if ended or not follow:
                    return
                shown = len(printed)
                time.sleep(FOLLOW_SECONDS)

    def stop(self, ticket: Ticket) -> None:
        with _client(ticket) as client:
            client.stop_job(ticket.native)
            deadline = time.monotonic() + STOP_SECONDS
            while not (state := client.get_job_status(ticket.native)).is_terminal():
                if time.monotonic() > deadline:
                    raise JobError(f"job {ticket.job!r} is still {state} after {STOP_SECONDS:g} s; try again")
                time.sleep(0.2)
            if ticket.cluster.ray.address is None:
                _retire(client, _folder(ticket))


def _retire(client: JobSubmissionClient, folder: Path) -> None:
    """End a private head that has nothing to do, which takes what it knows with it: that is written down before."""
    jobs = client.list_jobs()
    if any(not job.status.is_terminal() for job in jobs):
        return
    for job in jobs:
        if job.submission_id is not None:
            state, why = _state(job)
            write_text(folder / ENDED_FOLDER / f"{job.submission_id}.log", client.get_job_logs(job.submission_id))
            write_json(folder / ENDED_FOLDER / f"{job.submission_id}.json", {"state": state.value, "why": why})
    stop_head(folder)


def _ended(ticket: Ticket) -> tuple[State, str]:
    """What became of a job whose private head has ended."""
    kept = read_json(_folder(ticket) / ENDED_FOLDER / f"{ticket.native}.json")
    if kept is None:
        return State.FAILED, f"its Ray head has ended; `rlhf resubmit {ticket.job}` continues it"
    return State(kept["state"]), kept["why"]


def _state(job: JobInfo | JobDetails) -> tuple[State, str]:
    return STATES[job.status], job.message or ""


def _entrypoint(ticket: Ticket) -> str:
    command = [sys.executable, "-m", "rlhf.cli", "run", *ticket.arguments(), "--address", "auto"]
    # data paths of a recipe are relative to where the user stands; exec, so that a stop reaches the driver itself
    return f"cd {shlex.quote(ticket.folder)} && exec {shlex.join(command)}"


def _folder(ticket: Ticket) -> Path:
    """Of the private head."""
    return Path(ticket.runs) / HEAD_FOLDER


def _head(ticket: Ticket) -> Head | None:
    """The private head, if it is alive."""
    return find_head(_folder(ticket))


@contextlib.contextmanager
def _client(ticket: Ticket) -> Iterator[JobSubmissionClient]:
    """A client with the right token; what Ray answers becomes a JobError that says what to do."""
    address = ticket.cluster.ray.address
    token: str | None
    if address is None:
        head = _head(ticket)
        if head is None:
            raise JobError(f"no Ray head runs for {ticket.runs}; `rlhf submit` starts one, or give --address")
        address, token = head.address, Path(head.token_path).read_text().strip()
    elif address.startswith(("http://", "https://")):
        token = _given_token()
    else:
        raise JobError(f"cluster.ray.address = {address!r}: give the head's dashboard as http://HOST:PORT")
    where = f"the Ray head at {address}"
    try:
        yield _Client(address, headers=bearer(token))
    except (ConnectionError, requests.RequestException) as error:
        raise JobError(f"{where} does not answer; is it running, and is the address right?") from error
    except AuthenticationError as error:
        raise JobError(
            f"{where} refuses this token; set RAY_AUTH_TOKEN_PATH to the cluster's token file (for a head of ours, "
            f"{_folder(ticket) / 'token'})"
        ) from error
    except JobError:
        raise
    except RuntimeError as error:
        if ticket.native and "status code 404" in str(error):
            raise JobError(f"{where} knows no job {ticket.native!r}; it has forgotten it, or is another") from error
        raise


def _given_token() -> str | None:
    """The token in the environment, as Ray itself reads it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path is None:
        return None
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise JobError(f"RAY_AUTH_TOKEN_PATH = {path}: cannot be read ({error.strerror})") from error
