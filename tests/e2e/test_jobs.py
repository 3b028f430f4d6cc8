"""A private Ray head on this machine: who may speak to it, what a job does, and that nothing is left behind."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import requests

from actors import jobs
from actors.jobs.head import HEAD_FOLDER, find_head, start_head, stop_head
from actors.jobs.ticket import Ticket, keep
from actors.nodes import port as free_port
from rlhf.recipe import ClusterTable, Recipe, load
from tests.unit.toy_recipe import ONLY

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RECIPE = f"""
name = "refused"
model.path = "./no/such/model"
{ONLY}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    saved = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")}
    head = start_head(folder / HEAD_FOLDER, free_port())
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    yield folder
    stop_head(folder / HEAD_FOLDER)
    os.environ.update({name: value for name, value in saved.items() if value is not None})
    assert not [process for process in family if process.is_running()]


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[Recipe, Path]:
    path = tmp_path / "refused.toml"
    path.write_text(RECIPE)
    return load([path]), path


def wait(job: str, runs: Path) -> jobs.Found:
    deadline = time.monotonic() + 90
    while not (found := jobs.status(job, runs)).ended:
        assert time.monotonic() < deadline, str(found)
        time.sleep(0.2)
    return found


def sent_to(address: str, recipe: Recipe, runs: Path) -> Ticket:
    """A ticket of a job that nobody submitted, kept in `runs`."""
    cluster = ClusterTable.model_validate({"ray": {"address": address}})
    ticket = replace(Ticket.of(recipe, [], [], runs), cluster=cluster, native="any")
    keep(ticket, runs)
    return ticket


def test_every_socket_is_on_loopback(runs: Path) -> None:
    head = find_head(runs / HEAD_FOLDER)
    assert head is not None
    family = psutil.Process(head.pid).children(recursive=True)
    names = {name for process in family for name in ("raylet", "gcs_server") if name in process.name()}
    assert names == {"raylet", "gcs_server"}
    listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_the_token_is_its_owners_alone(runs: Path) -> None:
    token = runs / HEAD_FOLDER / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_a_client_without_the_token_is_refused(
    runs: Path, recipe: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head = find_head(runs / HEAD_FOLDER)
    assert head is not None
    assert requests.get(f"{head.address}/api/jobs/", timeout=10).status_code == 401
    wrong = {"Authorization": "Bearer " + "0" * 64}
    assert requests.get(f"{head.address}/api/jobs/", headers=wrong, timeout=10).status_code == 403
    (tmp_path / "token").write_text("0" * 64)
    ticket = sent_to(head.address, recipe[0], tmp_path)
    with pytest.raises(jobs.JobError, match="asks for a token, and none is given"):
        jobs.status(ticket.job, tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(jobs.JobError, match="refuses the token of RAY_AUTH_TOKEN_PATH"):
        jobs.status(ticket.job, tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.token_path)
    assert "knows no job 'any'" in jobs.status(ticket.job, tmp_path).why


def test_a_job_runs_the_command_line(runs: Path, recipe: tuple[Recipe, Path]) -> None:
    job = jobs.submit(Ticket.of(recipe[0], [recipe[1]], ["seed = 3"], runs), recipe[0], runs).job
    assert wait(job, runs).state is jobs.State.FAILED  # the plan refuses the recipe, in its own words
    assert "model.path = './no/such/model': no such folder" in "".join(jobs.logs(job, runs))
    assert (job, jobs.State.FAILED) in [(found.job, found.state) for found in jobs.list_jobs(runs)]


def test_a_job_joins_the_head_that_it_was_sent_to(runs: Path, tmp_path: Path) -> None:
    start_head(tmp_path / HEAD_FOLDER, free_port())  # which is now the last that was started here
    try:
        files = [ROOT / "recipes" / name for name in ("think_fusion_digits.toml", "sizes/smoke.toml")]
        recipe, overrides = load(files), ["resources.memory_gib = 0.1"]
        job = jobs.submit(Ticket.of(recipe, files, overrides, runs), recipe, runs).job
        assert wait(job, runs).state is jobs.State.FAILED
        # only who has seen what there is plans with it
        assert "more than resources.memory_gib = 0.1" in "".join(jobs.logs(job, runs))
    finally:
        stop_head(tmp_path / HEAD_FOLDER)


def test_a_second_head_is_told_that_the_port_is_taken(runs: Path, tmp_path: Path) -> None:
    head = find_head(runs / HEAD_FOLDER)
    assert head is not None
    with pytest.raises(jobs.JobError, match="is taken"):
        start_head(tmp_path, int(head.address.rpartition(":")[2]))


def test_a_head_that_is_not_there_is_said_to_be(recipe: tuple[Recipe, Path], tmp_path: Path) -> None:
    ticket = sent_to(f"http://127.0.0.1:{free_port()}", recipe[0], tmp_path)
    with pytest.raises(jobs.JobError, match="does not answer"):
        jobs.status(ticket.job, tmp_path)
    ticket = sent_to("nonsense", recipe[0], tmp_path)
    with pytest.raises(jobs.JobError, match=r"cluster.ray.address = 'nonsense': give the head's dashboard"):
        jobs.status(ticket.job, tmp_path)


def test_a_head_ends_with_its_last_job_and_what_it_knew_is_kept(runs: Path, recipe: tuple[Recipe, Path]) -> None:
    job = jobs.submit(Ticket.of(recipe[0], [recipe[1]], [], runs), recipe[0], runs).job
    before, printed = wait(job, runs), "".join(jobs.logs(job, runs, follow=True))
    head = find_head(runs / HEAD_FOLDER)
    assert head is not None
    assert Path(head.temporary).stat().st_mode & 0o777 == 0o700
    assert jobs.stop(job, runs) == before
    assert find_head(runs / HEAD_FOLDER) is None
    assert not Path(head.temporary).exists()
    assert jobs.status(job, runs) == before
    assert "".join(jobs.logs(job, runs)) == printed
