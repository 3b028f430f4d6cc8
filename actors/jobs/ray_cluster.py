"""Jobs of a Ray head, by its Jobs API: one that runs already, or a private one of the runs folder, started here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobInfo, JobStatus, JobSubmissionClient

from actors.imports import in_place, packages
from actors.jobs.archive import Archive, archive_of
from actors.jobs.backend import JobError, State, UnknownJobError
from actors.jobs.head import DASHBOARD_PORT, HEAD_FOLDER, Head, bearer, find_head, start_head, stop_head
from actors.jobs.record import read
from actors.jobs.ticket import Ticket
from actors.waiting import free_of, in_words
from rlhf.checkpoint import write_json, write_text
from rlhf.preemption import REQUEUE
from rlhf.recipe import Recipe

ANSWER_SECONDS, FOLLOW_SECONDS = 60.0, 2.0
STOP_SECONDS = 20.0  # beyond the job's own grace
ENDED_FOLDER = "ended"  # of a private head: what became of its jobs
STATES = {
    JobStatus.PENDING: State.WAITING,
    JobStatus.RUNNING: State.RUNNING,
    JobStatus.SUCCEEDED: State.SUCCEEDED,
    JobStatus.FAILED: State.FAILED,
    JobStatus.STOPPED: State.STOPPED,
}


class _Client(JobSubmissionClient):
    """Ray's client, which of itself waits for ever, with a deadline for every answer; and what else there is to ask."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer: requests.Response
        try:
            answer = super()._do_request(method, endpoint, **{"timeout": ANSWER_SECONDS, **options})
        except requests.RequestException as error:
            if (method, endpoint) == ("POST", "/api/jobs/"):  # the job itself, which may be there now
                raise TimeoutError(*error.args) from error
            raise
        return answer

    def submit_patiently(self, **request: Any) -> str:
        """Submit a job to a head that may just have started: what takes jobs on its node comes up last."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                return str(self.submit_job(**request))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def waits_for(self, driver: str | None) -> str:
        """The bundles that a driver asked for and that are not reserved yet, in words; "" where it waits for none."""
        where = f"filter_keys=creator_job_id&filter_predicates=%3D&filter_values={driver}&detail=1"
        groups = self._asked(f"/api/v0/placement_groups?{where}")["result"]["result"]
        waiting = [group for group in groups if driver is not None and group["state"] == "PENDING"]
        return in_words([bundle["unit_resources"] for group in waiting for bundle in group["bundles"]])

    def free(self) -> str:
        """What of the cluster nobody has reserved, in words."""
        usage = self._asked("/api/cluster_status?format=0")["clusterStatus"]["loadMetricsReport"]["usage"]
        return free_of({name: (total - used, total) for name, (used, total) in usage.items()})

    def _asked(self, endpoint: str) -> Any:
        answer = self._do_request("GET", endpoint)
        if answer.status_code != 200:
            self._raise_error(answer)
        return answer.json()["data"]


@dataclass(frozen=True)
class _Request:
    """What is handed over; `archive`: what takes the place of runtime_env's working_dir."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    archive: Archive | None


@dataclass(frozen=True)
class RayCluster:
    """The Ray backend, for jobs of the run folders in `runs`. `port`: of a private head that has to be started.

    A cluster with an address is sent the user's folder and our packages; RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must
    hold its token. A private head works in the user's folder itself.
    """

    runs: Path
    port: int | None = None

    def render(self, ticket: Ticket, recipe: Recipe) -> str:
        request = self._request(ticket, recipe)
        shown: dict[str, Any] = {
            "submission_id": ticket.job,
            "entrypoint": request.entrypoint,
            "runtime_env": request.runtime_env,
            "metadata": request.metadata,
        }
        if request.archive is not None:
            shown["working_dir"] = {"files": [*map(str, request.archive.files)], "beside": request.archive.recipes}
        return json.dumps(shown, indent=1) + "\n"

    def submit(self, ticket: Ticket, recipe: Recipe) -> str:
        request = self._request(ticket, recipe)
        if ticket.cluster.ray.address is None and find_head(_folder(ticket)) is None:
            start_head(_folder(ticket), DASHBOARD_PORT if self.port is None else self.port)
        with tempfile.TemporaryDirectory() as folder, _client(ticket) as client:
            environment = dict(request.runtime_env)
            if request.archive is not None:
                request.archive.write(zipped := Path(folder) / "folder.zip")
                environment["working_dir"] = str(zipped)
            return client.submit_patiently(
                entrypoint=request.entrypoint,
                submission_id=ticket.job,
                runtime_env=environment,
                metadata=request.metadata,
            )

    def _request(self, ticket: Ticket, recipe: Recipe) -> _Request:
        ray, folder = ticket.cluster.ray, Path(ticket.folder)
        environment: dict[str, Any] = {
            # of the process that ends the driver: as long as a checkpoint may take
            "env_vars": {**ray.env, "RAY_JOB_STOP_WAIT_TIME_S": str(ticket.cluster.grace_seconds)},
            "excludes": ["__pycache__"],
        }
        if ray.pip:
            environment["pip"] = ray.pip
        sent, python, files = None, "python", ticket.files
        if ray.address is None:
            python = "python" if ray.pip else sys.executable  # that of Ray's environment with those packages
            environment |= in_place(folder)
        else:
            _require_runs(ticket, _checked(ray.address))
            sent = archive_of(folder, ticket.files, recipe, [self.runs, Path(ticket.runs)])
            files = tuple(sent.recipes.get(file, file) for file in ticket.files)
            environment |= {"working_dir": str(folder), "py_modules": [*map(str, packages())]}
        # -P: our packages come before what lies in the folder; exec, so that a stop reaches the driver itself
        command = [python, "-P", "-m", "rlhf.cli", "run", *ticket.arguments(files), "--address", "auto"]
        return _Request(f"exec {shlex.join(command)}", environment, {"recipe": ticket.recipe}, sent)

    def state(self, ticket: Ticket) -> tuple[State, str]:
        if _head(ticket) is None and ticket.cluster.ray.address is None:
            return _ended(ticket)
        with _client(ticket) as client:
            found = client.get_job_info(ticket.native)
            state, why = _state(found)
            if state is State.RUNNING and (needed := client.waits_for(found.job_id)):
                return State.WAITING, f"it needs {needed}; {client.free()}"
            return state, why

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
            try:
                _end(client, ticket)
            finally:
                if ticket.cluster.ray.address is None:  # also one that was started for a job that never came
                    _retire(client, _folder(ticket))


def _checked(address: str) -> str:
    """The address of a head. Raises JobError for what is none."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large, an IPv6 address that does not end
        good = False
    if not good:
        raise JobError(f"cluster.ray.address = {address!r}: give the head's dashboard as http://HOST:PORT")
    return address


def _require_runs(ticket: Ticket, address: str) -> None:
    """Raise JobError where the run folders would be where they lie here, on machines that do not see this one's."""
    if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1"):
        return
    if ticket.cluster.runs is None:
        raise JobError(
            f"the nodes behind {address} may not see {ticket.runs}; say where run folders lie there, on storage that "
            "all of them share: -o 'cluster.runs = \"/shared/runs\"', or in the site's file"
        )
    if not Path(ticket.cluster.runs).is_absolute():
        raise JobError(
            f"cluster.runs = {ticket.cluster.runs!r} must be the path at which all nodes behind {address} see the run "
            'folders, such as "/shared/runs"'
        )


def _end(client: JobSubmissionClient, ticket: Ticket) -> None:
    """Tell a job to go, and wait for its end. Raises JobError where it does not end in time."""
    client.stop_job(ticket.native)
    limit = ticket.cluster.grace_seconds + STOP_SECONDS
    deadline = time.monotonic() + limit
    while not (state := client.get_job_status(ticket.native)).is_terminal():
        if time.monotonic() > deadline:
            raise JobError(f"job {ticket.job!r} is still {state} after {limit:g} s; try again")
        time.sleep(0.2)


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
    """What became of a job whose private head has ended. Raises UnknownJobError where nothing is kept of it."""
    path = _folder(ticket) / ENDED_FOLDER / f"{ticket.native}.json"
    kept = read(path, lambda told: (State(told["state"]), str(told["why"])), "remove it: the job then counts as failed")
    if kept is None:
        raise _headless(ticket)
    return kept


def _headless(ticket: Ticket) -> UnknownJobError:
    return UnknownJobError(f"no Ray head of {ticket.runs} is up")


def _state(job: JobInfo | JobDetails) -> tuple[State, str]:
    if job.status is JobStatus.FAILED and job.driver_exit_code == REQUEUE:
        return State.PREEMPTED, "it left a checkpoint for `rlhf resubmit`"
    if job.status is JobStatus.FAILED and job.driver_exit_code is not None:  # Ray's message is the end of the log
        return State.FAILED, f"exit status {job.driver_exit_code}, and `rlhf logs` says why"
    # of the other states Ray's message says no more than their names
    return STATES[job.status], (job.message or "") if job.status in (JobStatus.PENDING, JobStatus.FAILED) else ""


def _folder(ticket: Ticket) -> Path:
    """Of the private head."""
    return Path(ticket.runs) / HEAD_FOLDER


def _head(ticket: Ticket) -> Head | None:
    """The private head, if it is alive."""
    return find_head(_folder(ticket))


@contextlib.contextmanager
def _client(ticket: Ticket) -> Iterator[_Client]:
    """A client with the right token; what Ray answers becomes a JobError that says what to do."""
    address = ticket.cluster.ray.address
    if address is None:
        head = _head(ticket)
        if head is None:
            raise _headless(ticket)
        address, token = head.address, _Token.of_file(head.token_path, head.token_path)
    else:
        address, token = _checked(address), _Token.given()
    where = f"the Ray head at {address}"
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # of each package they tell that it is sent
    try:
        yield _Client(address, headers=bearer(token.text))
    except (ConnectionError, TimeoutError, requests.RequestException) as error:
        raise JobError(
            f"{where} does not answer; is it running, and is the address right? ({_cause(error)})"
        ) from error
    except AuthenticationError as error:
        ours = _folder(ticket) / "token"
        hint = f" (of a head of ours, {ours})" if ours.exists() else ""
        raise JobError(f"{where} {token.refused}{hint}") from error
    except JobError:
        raise
    except RuntimeError as error:
        if ticket.native and "status code 404" in str(error):
            raise UnknownJobError(
                f"{where} knows no job {ticket.native!r}; it was started anew since, or is another"
            ) from error
        raise JobError(f"{where}: {error}") from error


def _cause(error: Exception) -> str:
    """What lies under what Ray and requests made of it."""
    known: Any = error.__context__ if isinstance(error, ConnectionError) and error.__context__ else error
    reason = getattr(known.args[0], "reason", None) if known.args else None
    return str(reason or known).rpartition("): ")[2]


@dataclass(frozen=True)
class _Token:
    """What is shown to a head, and what to do where it is `refused`."""

    text: str | None
    refused: str

    @classmethod
    def given(cls) -> _Token:
        """The token in the environment, as Ray itself reads it. Raises JobError for what can be none."""
        if text := os.environ.get("RAY_AUTH_TOKEN"):
            refused = "refuses the token in RAY_AUTH_TOKEN; correct it, or unset it and set RAY_AUTH_TOKEN_PATH"
            return cls(_legible(text, "RAY_AUTH_TOKEN"), f"{refused} to the cluster's token file")
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        if path is None:
            return cls(None, "asks for a token, and none is given; set RAY_AUTH_TOKEN_PATH to the cluster's token file")
        return cls.of_file(path, f"RAY_AUTH_TOKEN_PATH = {path}")

    @classmethod
    def of_file(cls, path: str, named: str) -> _Token:
        try:
            text = Path(path).read_text(errors="replace").strip()
        except OSError as error:
            raise JobError(f"{named}: cannot be read ({error.strerror}); name the cluster's token file") from error
        return cls(_legible(text, named), f"refuses the token of {named}; name the cluster's token file")


def _legible(text: str, named: str) -> str:
    """A token, if it can be one. Raises JobError otherwise."""
    if not text or not text.isascii() or not text.isprintable():
        what = "is not one line of ASCII" if text else "is empty"
        raise JobError(f"{named}: what should be a token {what}; give the cluster's")
    return text
