"""A Jobs API that does not answer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from actors import jobs


def test_a_head_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # takes the connection, and no more
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(jobs.JobError, match="does not answer; is it running"):
            jobs.status("a-job", tmp_path, address)
