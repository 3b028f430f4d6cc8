"""A Ray head of our own on this machine: started, found, ended.

Whoever reaches a Ray head may run code on it. So a head started here listens on loopback only, asks every client for
a token, and reports nothing to anybody.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import requests

from actors import nodes
from actors.jobs.backend import JobError
from actors.jobs.record import read
from actors.security import private_folder, ray_environment, token_file
from rlhf.checkpoint import write_json

HEAD_FOLDER, DESCRIPTION = ".ray", "head.json"
DASHBOARD_PORT = 8265
START_SECONDS, STOP_SECONDS = 120.0, 20.0  # a head took 35 to 45 s on two busy cores


@dataclass(frozen=True)
class Head:
    """A Ray head on this machine. address: of its Jobs API; pid: of `ray start --block`, which ends with its children;
    created: that process's start time, so that a number used again is not mistaken for it; temporary: Ray's files."""

    address: str
    token_path: str
    pid: int
    created: float
    temporary: str

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def start_head(folder: Path, port: int = DASHBOARD_PORT) -> Head:
    """Start a Ray head whose token, log and description lie in `folder`; returns when its Jobs API answers.

    Raises JobError when the folder cannot be written, the port is none or taken, or the head does not come up, with the
    end of its log.
    """
    _require_free(port)
    log = folder / "head.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token = token_file(folder)
        log.touch(mode=0o600)
    except OSError as error:
        raise JobError(
            f"{error.filename or folder}: cannot be written ({error.strerror}), and a Ray head keeps its token and log "
            "there; choose another folder with --runs"
        ) from error
    # the head's own token, whatever this process was given for another cluster
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    temporary = private_folder()
    environment |= ray_environment(folder) | {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(temporary)}
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--port=0", "--dashboard-agent-listen-port=0"),
        # Ray's fixed defaults for these would collide with a second head, and with the dashboard's port
        *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={nodes.port()}"),
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
    head = Head(f"http://127.0.0.1:{port}", str(token), pid, psutil.Process(pid).create_time(), str(temporary))
    write_json(folder / DESCRIPTION, asdict(head))
    deadline = time.monotonic() + START_SECONDS
    while not _answers(head):
        if not head.alive or time.monotonic() > deadline:
            what = "ended" if not head.alive else f"did not answer within {START_SECONDS:g} s"
            stop_head(folder)
            raise JobError(f"the Ray head {what}; its log, {log}, ends with:\n{_tail(log)}")
        time.sleep(0.2)
    return head


def find_head(folder: Path) -> Head | None:
    """The head described in `folder`, if it is still alive. Raises JobError where the description cannot be read."""
    remedy = "end the Ray head that you started there, if it runs, then remove the file"
    head = read(folder / DESCRIPTION, lambda kept: Head(**kept), remedy)
    return head if head is not None and head.alive else None


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
        shutil.rmtree(head.temporary, ignore_errors=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)


def bearer(token: str | None) -> dict[str, str]:
    """The headers by which a token is shown."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _require_free(port: int) -> None:
    if not 0 < port < 2**16:
        raise JobError(f"--port {port}: a port is a number from 1 to {2**16 - 1}; choose one of those")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise JobError(
                f"port {port} is taken, so no Ray head can serve its Jobs API there; if it is a head of yours, give "
                f"--address http://127.0.0.1:{port}, else another --port"
            ) from error


def _answers(head: Head) -> bool:
    try:
        token = Path(head.token_path).read_text().strip()
        # the dashboard answers before there is a node for a job to run on
        found = requests.get(f"{head.address}/nodes?view=summary", headers=bearer(token), timeout=5)
    except requests.RequestException:
        return False
    return found.status_code == 200 and bool(found.json()["data"]["summary"])


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
