"""Running curricula as jobs of a Ray head: submit, status, logs, stop; and the settings that keep a head private.

Whoever reaches a Ray head may run code on it. So a head started here listens on loopback only, asks every client for
a token, and reports nothing to anybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from actors.security import JOB_STOP_SECONDS, ray_environment, token_file
from rlhf.recipe import Recipe

HEAD_FOLDER = ".ray"
DASHBOARD_PORT = 8265
START_SECONDS, STOP_SECONDS = 120.0, 20.0  # a head took 35 to 45 s on two busy cores
ANSWER_SECONDS = 60.0


class _Client(JobSubmissionClient):
    """Ray's client, which of itself waits for ever, with a deadline for every answer."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer: requests.Response = super()._do_request(method, endpoint, **{"timeout": ANSWER_SECONDS, **options})
        return answer


class JobError(RuntimeError):
    """A job or a head that cannot be reached, started or found; the message says what to do."""


@dataclass(frozen=True)
class Head:
    """A Ray head on this machine. address: of its Jobs API; pid: of `ray start --block`, which ends with its children;
    created: that process's start time, so that a number used again is not mistaken for it."""

    address: str
    token_path: str
    pid: int
    created: float

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def start_head(folder: Path, port: int = DASHBOARD_PORT) -> Head:
    """Start a Ray head whose token, log and description lie in `folder`; returns when its Jobs API answers.

    Raises JobError when the port is taken or the head does not come up, with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _require_free(port)
    token = token_file(folder)
    # the head's own token, whatever this process was given for another cluster
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    environment |= ray_environment(folder) | {"RAY_AUTH_TOKEN_PATH": str(token)}
    log = folder / "head.log"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--port=0", "--dashboard-agent-listen-port=0"),
        # Ray's fixed defaults for these would collide with a second head, and with the dashboard's port
        *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={_free_port()}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
    ]
    pid = os.posix_spawn(
        sys.executable,
        command,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,  # Ctrl-C of the command that submits must not end the head
    )
    head = Head(f"http://127.0.0.1:{port}", str(token), pid, psutil.Process(pid).create_time())
    (folder / "head.json").write_text(json.dumps(asdict(head)))
    deadline = time.monotonic() + START_SECONDS
    while not _answers(head):
        if not head.alive or time.monotonic() > deadline:
            what = "ended" if not head.alive else f"did not answer within {START_SECONDS:g} s"
            stop_head(folder)
            raise JobError(f"the Ray head {what}; its log, {log}, ends with:\n{_tail(log)}")
        time.sleep(0.2)
    return head


def find_head(folder: Path) -> Head | None:
    """The head described in `folder`, if it is still alive."""
    path = folder / "head.json"
    if not path.exists():
        return None
    head = Head(**json.loads(path.read_text()))
    return head if head.alive else None


def stop_head(folder: Path) -> None:
    """End the head described in `folder` and every process under it; does nothing when there is none."""
    head = find_head(folder)
    if head is not None:
        parent = psutil.Process(head.pid)
        # listed before anything ends: Ray's dashboard and runtime-environment agents outlive a raylet by minutes
        family = [parent, *parent.children(recursive=True)]
        with contextlib.suppress(psutil.NoSuchProcess):
            parent.terminate()
        _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_SECONDS)
    (folder / "head.json").unlink(missing_ok=True)


def submit(
    recipe: Recipe,
    recipe_files: Sequence[str | Path],
    overrides: Sequence[str],
    runs: Path,
    address: str | None = None,
    port: int | None = None,
) -> str:
    """Run `rlhf run` with these arguments as a job; returns the job's name.

    Without `address` the job goes to the head of `runs`, started here, at `port`, if there is none. With one, this
    folder must be reachable at the same path there, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must hold the cluster's
    token.
    """
    if address is None and find_head(runs / HEAD_FOLDER) is None:
        start_head(runs / HEAD_FOLDER, port or DASHBOARD_PORT)
    job = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    command = [sys.executable, "-m", "rlhf.cli", "run", *(str(Path(file).absolute()) for file in recipe_files)]
    command += [argument for override in overrides for argument in ("-o", override)]
    command += ["--runs", str(runs.absolute()), "--address", "auto"]
    # data paths of a recipe are relative to where the user stands; exec, so that a stop reaches the driver itself
    entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
    with _client(runs, address) as client:
        return str(client.submit_job(entrypoint=entrypoint, submission_id=job, metadata={"recipe": recipe.name}))


def status(job: str, runs: Path, address: str | None = None) -> str:
    """The job's state in a line: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED, and Ray's message."""
    with _client(runs, address, job) as client:
        found = client.get_job_info(job)
        return f"{job}: {found.status}" + (f" ({found.message})" if found.message else "")


def logs(job: str, runs: Path, address: str | None = None) -> str:
    """Everything the job printed so far."""
    with _client(runs, address, job) as client:
        return str(client.get_job_logs(job))


def stop(job: str, runs: Path, address: str | None = None) -> str:
    """Stop the job and wait for its end; a head of `runs` that has nothing else to do ends with it."""
    with _client(runs, address, job) as client:
        client.stop_job(job)
        deadline = time.monotonic() + JOB_STOP_SECONDS + STOP_SECONDS
        while not (state := client.get_job_status(job)).is_terminal():
            if time.monotonic() > deadline:
                raise JobError(f"job {job!r} is still {state} after {JOB_STOP_SECONDS + STOP_SECONDS:g} s; try again")
            time.sleep(0.2)
        busy = any(other.status in (JobStatus.PENDING, JobStatus.RUNNING) for other in client.list_jobs())
    if address is None and not busy:
        stop_head(runs / HEAD_FOLDER)
        return f"{job}: {state}; no other job runs, so the head has ended too"
    return f"{job}: {state}"


@contextlib.contextmanager
def _client(runs: Path, address: str | None, job: str | None = None) -> Iterator[JobSubmissionClient]:
    """A client with the right token; what Ray answers becomes a JobError that says what to do."""
    token: str | None = None
    if address is None:
        head = find_head(runs / HEAD_FOLDER)
        if head is None:
            raise JobError(f"no Ray head runs for {runs}; `rlhf submit` starts one, or give --address")
        address, token = head.address, Path(head.token_path).read_text().strip()
    elif address.startswith(("http://", "https://")):
        token = _given_token()
    else:
        raise JobError(f"--address {address}: give the head's dashboard as http://HOST:PORT")
    where = f"the Ray head at {address}"
    try:
        yield _Client(address, headers=_bearer(token))
    except (ConnectionError, requests.RequestException) as error:
        raise JobError(f"{where} does not answer; is it running, and is the address right?") from error
    except AuthenticationError as error:
        raise JobError(
            f"{where} refuses this token; set RAY_AUTH_TOKEN_PATH to the cluster's token file (for a head of ours, "
            f"{runs / HEAD_FOLDER / 'token'})"
        ) from error
    except JobError:
        raise
    except RuntimeError as error:
        if job is not None and "status code 404" in str(error):
            raise JobError(f"{where} knows no job {job!r}; `rlhf submit` printed its name") from error
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


def _bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise JobError(
                f"port {port} is taken, so no Ray head can serve its Jobs API there; if it is a head of yours, give "
                f"--address http://127.0.0.1:{port}, else another --port"
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(head: Head) -> bool:
    try:
        token = Path(head.token_path).read_text().strip()
        # the dashboard answers before there is a node for a job to run on
        found = requests.get(f"{head.address}/nodes?view=summary", headers=_bearer(token), timeout=5)
    except requests.RequestException:
        return False
    return found.status_code == 200 and bool(found.json()["data"]["summary"])


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
