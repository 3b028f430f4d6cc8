"""What is kept of a job, for whom, and which run folder is its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from actors import jobs
from actors.jobs.ticket import Ticket, find, keep, names
from rlhf.recipe import ClusterTable, Recipe, load


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
    assert names(tmp_path) == [ticket.job, again.job]


def test_a_job_is_told_of_the_cluster(recipe: Recipe, tmp_path: Path) -> None:
    ticket = Ticket.of(recipe, ["small.toml"], ["seed = 1"], tmp_path / "runs")
    *arguments, option, told, flag, runs = ticket.arguments()
    assert arguments == ["small.toml", "-o", "seed = 1"]
    assert (option, flag, runs) == ("-o", "--runs", str(tmp_path / "runs"))
    assert load([tmp_path / "small.toml"], [told]).cluster == recipe.cluster
    secret = recipe.cluster.model_copy(update={"ray": recipe.cluster.ray.model_copy(update={"env": {"KEY": "secret"}})})
    assert "secret" not in str(replace(ticket, cluster=secret).arguments())  # a command line is everybody's


def test_tickets_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / ".jobs").write_text("a file")
    for verb in (lambda: jobs.list_jobs(tmp_path), lambda: jobs.status("any", tmp_path)):
        with pytest.raises(jobs.JobError, match=r"\.jobs.*: cannot be read \(Not a directory\)"):
            verb()


def test_a_job_that_nobody_submitted_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(jobs.JobError, match="has no job 'any'; none was submitted from here"):
        jobs.status("any", tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_of_the_machine_sees_nothing(recipe: Recipe, tmp_path: Path) -> None:
    import numpy as np

    from actors.security import private_folder, token_file
    from actors.shared import Owner

    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and len(folder.parts) > 2:
            folder.chmod(0o755)  # that of a run, where it lies open
    keep(replace(Ticket.of(recipe, ["small.toml"], [], tmp_path), native="1"), tmp_path)
    owner, ours = Owner(), private_folder()
    weights = owner.put(0, [("w", np.ones(3, np.float32))])
    (ours / "socket").touch()
    try:
        assert readable(tmp_path / "small.toml")
        assert readable(token_file(tmp_path / "shown")) is False
        assert readable(next((tmp_path / ".jobs").iterdir())) is False
        assert readable(ours / "socket") is False
        assert readable(Path(weights.path)) is False
    finally:
        (ours / "socket").unlink()
        ours.rmdir()


def readable(path: Path) -> bool:
    """Whether a user who owns nothing can open a file."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.close(os.open(path, os.O_RDONLY))
            status = 0
        except PermissionError:
            status = 1
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1)
    return os.waitstatus_to_exitcode(status) == 0


def test_claims_are_folders_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    def folder(to: str, claim: str) -> object:
        cluster = {"to": to, "runs": "/runs", "kuberay": {"claim": claim}}
        told = recipe.model_copy(update={"cluster": ClusterTable.model_validate(cluster)})
        return Ticket.of(told, [], [], tmp_path).run_folder

    assert folder("kuberay", "a") == folder("kuberay", "a") != folder("kuberay", "b")
    assert folder("slurm", "a") == folder("slurm", "b")


def test_run_folders_of_two_ray_clusters_are_two(recipe: Recipe, tmp_path: Path) -> None:
    def folder(address: str | None, runs: str | None) -> object:
        cluster = {"ray": {"address": address}, "runs": runs}
        told = recipe.model_copy(update={"cluster": ClusterTable.model_validate(cluster)})
        return Ticket.of(told, [], [], tmp_path).run_folder

    assert folder("http://a:1", "/runs") == folder("http://a:1", "/runs") != folder("http://b:1", "/runs")
    assert folder(None, None) == folder("http://127.0.0.1:8265", None)  # both here, whoever serves the jobs
