"""A private Ray head on this machine: who may speak to it, what a job does, and that nothing is left behind."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from actors import jobs
from rlhf.recipe import Recipe, load

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

RECIPE = """
name = "refused"
model = {path = "./no/such/model"}
[[stages]]
name = "only"
kind = "sft"
data = {rows = 1}
steps = 1
batch_size = 1
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    saved = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")}
    head = jobs.start_head(folder / jobs.HEAD_FOLDER, free_port())
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    yield folder
    jobs.stop_head(folder / jobs.HEAD_FOLDER)
    os.environ.update({name: value for name, value in saved.items() if value is not None})
    assert not [process for process in family if process.is_running()]


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[Recipe, Path]:
    path = tmp_path / "refused.toml"
    path.write_text(RECIPE)
    return load([path]), path


def wait(job: str, runs: Path) -> str:
    deadline = time.monotonic() + 90
    while (state := jobs.status(job, runs)).split()[1] in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    return state


def test_every_socket_is_on_loopback(runs: Path) -> None:
    head = jobs.find_head(runs / jobs.HEAD_FOLDER)
    assert head is not None
    family = psutil.Process(head.pid).children(recursive=True)
    names = {name for process in family for name in ("raylet", "gcs_server") if name in process.name()}
    assert names == {"raylet", "gcs_server"}
    listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_the_token_is_its_owners_alone(runs: Path) -> None:
    token = runs / jobs.HEAD_FOLDER / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_a_client_without_the_token_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    head = jobs.find_head(runs / jobs.HEAD_FOLDER)
    assert head is not None
    assert requests.get(f"{head.address}/api/jobs/", timeout=10).status_code == 401
    wrong = {"Authorization": "Bearer " + "0" * 64}
    assert requests.get(f"{head.address}/api/jobs/", headers=wrong, timeout=10).status_code == 403
    (tmp_path / "token").write_text("0" * 64)
    for path in (None, tmp_path / "token"):
        if path is not None:
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        with pytest.raises(jobs.JobError, match="refuses this token"):
            jobs.status("any", runs, head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.token_path)
    with pytest.raises(jobs.JobError, match="knows no job 'any'"):
        jobs.status("any", runs, head.address)


def test_a_job_runs_the_command_line(runs: Path, recipe: tuple[Recipe, Path]) -> None:
    job = jobs.submit(recipe[0], [recipe[1]], ["seed = 3"], runs)
    assert wait(job, runs).startswith(f"{job}: FAILED")  # the plan refuses the recipe, in its own words
    assert "model.path = './no/such/model': no such folder" in jobs.logs(job, runs)


def test_a_second_head_is_told_that_the_port_is_taken(runs: Path, tmp_path: Path) -> None:
    head = jobs.find_head(runs / jobs.HEAD_FOLDER)
    assert head is not None
    with pytest.raises(jobs.JobError, match="is taken"):
        jobs.start_head(tmp_path, int(head.address.rpartition(":")[2]))


def test_without_a_head_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(jobs.JobError, match="`rlhf submit` starts one"):
        jobs.status("any", tmp_path)
    with pytest.raises(jobs.JobError, match="does not answer"):
        jobs.status("any", tmp_path, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(jobs.JobError, match="--address nonsense: give the head's dashboard"):
        jobs.status("any", tmp_path, "nonsense")
