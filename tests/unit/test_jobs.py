"""Tickets of jobs, and a Jobs API that does not answer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from actors import jobs
from actors.jobs import ray_cluster
from actors.jobs.ticket import Ticket, find, find_all, keep
from rlhf.cli import main
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


@dataclass
class Fake:
    """A cluster that remembers what it was given; every job is in the same state."""

    now: tuple[jobs.State, str] = (jobs.State.RUNNING, "")
    given: list[tuple[Ticket, Recipe]] = field(default_factory=list)

    def render(self, ticket: Ticket, recipe: Recipe) -> str:
        return f"{ticket.cluster.to} {recipe.seed}\n"

    def submit(self, ticket: Ticket, recipe: Recipe) -> str:
        self.given.append((ticket, recipe))
        return f"native-{len(self.given)}"

    def state(self, ticket: Ticket) -> tuple[jobs.State, str]:
        return self.now

    def logs(self, ticket: Ticket, follow: bool) -> Iterator[str]:
        yield from ("one\n", "two\n" if follow else "")

    def stop(self, ticket: Ticket) -> None:
        self.now = (jobs.State.STOPPED, "")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """A fake cluster, and a folder with a recipe that a plan accepts, where the user stands."""
    text = (Path(__file__).parents[2] / "recipes/think_fusion_digits.toml").read_text()
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "digits.toml").write_text(text)
    (tmp_path / "user" / "site.toml").write_text("[cluster]\nto = 'slurm'\nqueue = 'fast'\n")
    monkeypatch.chdir(tmp_path / "user")
    fake = Fake()
    monkeypatch.setattr(jobs, "backend", lambda *_: fake)
    return fake


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


def test_a_job_goes_where_flags_and_site_say(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "digits.toml", "--cluster", "site.toml", "-o", "seed = 4", "--dry-run"]) == 0
    assert capsys.readouterr().out == "slurm 4\n"
    assert main(["submit", "digits.toml", "--cluster", "site.toml", "--to", "kuberay", "--dry-run"]) == 0
    assert capsys.readouterr().out == "kuberay 0\n"
    assert not cluster.given
    assert not Path("runs").exists()
    assert main(["submit", "digits.toml", "--cluster", "site.toml", "-o", "seed = 4"]) == 0
    ((ticket, recipe),) = cluster.given
    assert capsys.readouterr().out == f"{ticket.job}\n"
    assert (ticket.files, ticket.overrides, recipe.seed, ticket.cluster.queue) == (
        ("digits.toml",),
        ("seed = 4",),
        4,
        "fast",
    )
    assert find(ticket.job, Path("runs")) == replace(ticket, native="native-1")


def test_a_recipe_that_cannot_run_is_not_submitted(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    for dry in ([], ["--dry-run"]):
        assert main(["submit", "digits.toml", "-o", "stages.align.start = 'none'", *dry]) == 2
        assert "'none'" in capsys.readouterr().err
    assert not cluster.given


def test_what_ended_is_submitted_again_from_where_the_user_stood(
    cluster: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "digits.toml", "--cluster", "site.toml", "-o", "seed = 4"]) == 0
    job = capsys.readouterr().out.strip()
    monkeypatch.chdir(tmp_path)
    runs = ["--runs", "user/runs"]
    assert main(["resubmit", job, *runs]) == 1
    assert f"job {job!r} is running, and two cannot share its run folder" in capsys.readouterr().err
    cluster.now = (jobs.State.PREEMPTED, "")
    assert main(["resubmit", job, *runs]) == 0
    first, again = cluster.given
    assert again == (replace(first[0], job=again[0].job), first[1])
    assert capsys.readouterr().out == f"{again[0].job}\n"
    assert main(["resubmit", job, "--runs", "nowhere"]) == 1
    assert f"nowhere/.jobs has no job {job!r}; none was submitted from here" in capsys.readouterr().err


def test_jobs_are_listed_with_what_they_wait_for(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.now = (jobs.State.WAITING, "it needs 2 × 1 CPU; 0 of 3 CPU are free")
    made = []
    for _ in range(2):
        assert main(["submit", "digits.toml"]) == 0
        made.append(capsys.readouterr().out.strip())
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert shown.index(made[0]) < shown.index(made[1])
    assert shown.count("waiting") == 2
    assert "it needs 2 × 1 CPU; 0 of 3 CPU are free" in shown
    assert main(["status", made[0]]) == 0
    assert capsys.readouterr().out == f"{made[0]}: waiting ({cluster.now[1]})\n"
    assert main(["logs", made[0], "--follow"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert main(["stop", made[0]]) == 0
    assert capsys.readouterr().out == f"{made[0]}: stopped\n"


def test_a_driver_that_was_told_to_go_is_preempted() -> None:
    from ray.job_submission import JobInfo, JobStatus

    def ended(status: int) -> tuple[jobs.State, str]:
        return ray_cluster._state(JobInfo(JobStatus.FAILED, "run", message="the log's end", driver_exit_code=status))

    assert ended(75) == (jobs.State.PREEMPTED, "it left a checkpoint for `rlhf resubmit`")
    assert ended(3) == (jobs.State.FAILED, "exit status 3, and `rlhf logs` says why")


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


def test_what_another_machine_cannot_see_is_not_sent_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders of this machine mean nothing on a cluster's, and keys are on no command line."""
    monkeypatch.chdir(tmp_path)
    files, overrides = (
        [str(Path(__file__).parents[2] / "recipes" / "think_fusion_digits.toml")],
        ["cluster.ray.env = {KEY = 'secret'}"],
    )
    for runs, refused in ((None, True), ("/shared/runs", False)):
        more = ["cluster.ray.address = 'http://192.0.2.7:8265'", *([f"cluster.runs = '{runs}'"] if runs else [])]
        recipe = load(files, [*overrides, *more])
        ticket = jobs.Ticket.of(recipe, files, [*overrides, *more, "seed = 3"], tmp_path)
        assert "secret" not in " ".join(ticket.arguments())
        assert "seed = 3" in ticket.arguments()
        if refused:
            with pytest.raises(jobs.JobError, match=r"may not see .*cluster\.runs"):
                jobs.render(ticket, recipe, tmp_path)
        else:
            assert "--runs /shared/runs" in jobs.render(ticket, recipe, tmp_path)
