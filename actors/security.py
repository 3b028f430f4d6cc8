"""The settings that keep a Ray head private. Ray reads them when it is imported, so this module does not import it."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from pathlib import Path

# Ray's job supervisor sends SIGTERM to a job that is stopped, and SIGKILL so many seconds later: as many as
# cluster.grace_seconds has by default
JOB_STOP_SECONDS, RAY_JOB_STOP_SECONDS = 120, 3
WAIT, OF_A_JOB = "RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_CONFIG_JSON_ENV_VAR"


def ray_environment(folder: Path) -> dict[str, str]:
    """Environment variables to set before ray is imported or `ray start` runs: token authentication, loopback, no usage
    statistics. The token is the one already in the environment (inside a job), else `folder`'s, made where missing."""
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray 2.60 reads this on every system: 0 makes the node's own address 127.0.0.1
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    if OF_A_JOB not in os.environ:  # where it says how long the job is waited for
        settings[WAIT] = str(JOB_STOP_SECONDS)
    if not os.environ.get("RAY_AUTH_TOKEN"):
        settings["RAY_AUTH_TOKEN_PATH"] = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(token_file(folder))
    return settings


def job_stop_seconds() -> float:
    """How long Ray waits for this process where it is a job's, between asking it to stop and killing it."""
    return float(os.environ.get(WAIT, RAY_JOB_STOP_SECONDS)) if OF_A_JOB in os.environ else math.inf


def token_file(folder: Path) -> Path:
    """`folder`'s token, 256 random bits readable by its owner only; made whole, so that two makers agree on one."""
    path = folder.absolute() / "token"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"token.{os.getpid()}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
        partial.unlink()
    return path
