"""Records of jobs and of Ray heads, JSON files each, and the one error of what goes wrong with either."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


class JobError(RuntimeError):
    """A job or a cluster that cannot be reached, started or found; the message says what to do."""

    @property
    def unanswered(self) -> bool:
        """Whether the cluster was asked and did not answer in time: it may have done what it was asked."""
        return isinstance(self.__cause__, TimeoutError | subprocess.TimeoutExpired)


def read(path: Path, made: Callable[[dict[str, Any]], Made], remedy: str) -> Made | None:
    """What is `made` of a record; None without one. Raises JobError for one that cannot be read or is damaged, with
    what to do (`remedy`)."""
    try:
        return made(json.loads(path.read_text()))
    except FileNotFoundError as error:
        if not os.path.lexists(path):
            return None
        raise JobError(f"{path}: a link to nothing; {remedy}") from error
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"{path}: damaged ({error}); {remedy}") from error
