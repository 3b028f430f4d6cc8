"""Tickets of jobs, and a Jobs API that does not answer."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from actors import jobs
from actors.jobs import ray_cluster
from actors.jobs.ticket import Ticket, find, find_all, keep
from rlhf.recipe import ClusterTable, Recipe, load

RECIPE = """
name = "small"
model = {path = "./no/such/model"}
[cluster]
grace_seconds = 60
[[stages]]
name = "only"
kind = "sft"
data = {rows = 1}
steps = 1
batch_size = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "small.toml").write_text(RECIPE)
    return load([tmp_path / "small.toml"])


def addressed(ticket: Ticket, address: str) -> Ticket:
    cluster = ClusterTable.model_validate({"ray": {"address": address}})
    return replace(ticket, cluster=cluster, native=ticket.job)


def test_a_ticket_is_kept_whole_for_its_owner(recipe: Recipe, tmp_path: Path) -> None:
    ticket = replace(Ticket.of(recipe, ["small.toml"], ["seed = 1"], tmp_path / "runs"), native="17")
    keep(ticket, tmp_path)
    assert find(ticket.job, tmp_path) == ticket
    assert find("another", tmp_path) is None
    assert (tmp_path / ".jobs").stat().st_mode & 0o777 == 0o700
    again = ticket.again()
    assert again.job != ticket.job
    assert replace(again, job=ticket.job, native="17") == ticket
    keep(again, tmp_path)
    assert find_all(tmp_path) == [ticket, again]


def test_a_job_is_told_of_the_cluster(recipe: Recipe, tmp_path: Path) -> None:
    ticket = Ticket.of(recipe, ["small.toml"], ["seed = 1"], tmp_path / "runs")
    *arguments, option, told, flag, runs = ticket.arguments()
    assert arguments == ["small.toml", "-o", "seed = 1"]
    assert (option, flag, runs) == ("-o", "--runs", str(tmp_path / "runs"))
    assert load([tmp_path / "small.toml"], [told]).cluster == recipe.cluster
    secret = recipe.cluster.model_copy(update={"ray": recipe.cluster.ray.model_copy(update={"env": {"KEY": "secret"}})})
    assert "secret" not in str(replace(ticket, cluster=secret).arguments())  # a command line is everybody's


def test_a_damaged_ticket_is_named(tmp_path: Path) -> None:
    (tmp_path / ".jobs").mkdir()
    (tmp_path / ".jobs" / "torn.json").write_text("{")
    with pytest.raises(jobs.JobError, match=r"torn.json: no ticket of a job .*; remove it"):
        jobs.list_jobs(tmp_path)


def test_a_job_that_nobody_submitted_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(jobs.JobError, match="has no job 'any'; none was submitted from here"):
        jobs.status("any", tmp_path)


def test_a_head_that_says_nothing_is_listed_with_that(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "ANSWER_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # takes the connection, and no more
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ticket = addressed(Ticket.of(recipe, ["small.toml"], [], tmp_path), address)
        keep(ticket, tmp_path)
        with pytest.raises(jobs.JobError, match="does not answer; is it running"):
            jobs.status(ticket.job, tmp_path)
        (found,) = jobs.list_jobs(tmp_path)
    assert found.state is None
    assert "does not answer; is it running" in found.why


def test_a_private_head_that_is_gone_has_lost_its_jobs(recipe: Recipe, tmp_path: Path) -> None:
    ticket = Ticket.of(recipe, ["small.toml"], [], tmp_path)
    keep(replace(ticket, native=ticket.job), tmp_path)
    found = jobs.status(ticket.job, tmp_path)
    assert found.state is jobs.State.FAILED
    assert found.why == f"its Ray head has ended; `rlhf resubmit {ticket.job}` continues it"
