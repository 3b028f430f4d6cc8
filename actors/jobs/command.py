"""A cluster's command line, asked with a deadline: kubectl, or one of Slurm's."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from actors.jobs.backend import JobError

ANSWER_SECONDS = 60.0
# in the words of Slurm, of Kubernetes and of Go
UNANSWERED = re.compile("timed out|deadline exceeded|connection (reset|lost)", re.IGNORECASE)


class RefusedError(JobError):
    """A command that ran and said no; `said` is what it printed as an error."""

    def __init__(self, command: str, status: int, said: str) -> None:
        super().__init__(f"{command} ended with status {status}: {said or 'it said nothing'}")
        self.said = said

    @property
    def unanswered(self) -> bool:
        """Whether it was the cluster that did not answer the command in time."""
        return UNANSWERED.search(self.said) is not None


def ask(*command: str, absent: str, given: str | None = None, seconds: float = ANSWER_SECONDS) -> str:
    """What a command prints. `given`: on its input. Raises RefusedError where it fails, and JobError where there is no
    such command (`absent`: what to do then) or it takes longer than `seconds`."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, check=False)
    except FileNotFoundError as error:
        raise JobError(f"there is no {command[0]} here: {absent}") from error
    except subprocess.TimeoutExpired as error:
        raise JobError(f"{_called(command)} did not answer within {seconds:g} s; is its cluster up?") from error
    if done.returncode != 0:
        raise RefusedError(_called(command), done.returncode, done.stderr.strip() or done.stdout.strip())
    return done.stdout


def _called(command: Sequence[str]) -> str:
    """What an error calls a command: `kubectl apply`, or `squeue`, which has options alone."""
    return " ".join(word for word in command[:2] if not word.startswith("-"))
