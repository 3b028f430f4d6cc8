"""The verbs of jobs, and what a submit leaves behind, on a cluster that is a fake."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from actors import jobs
from actors.jobs.backend import UnknownJobError
from actors.jobs.ticket import Ticket, find, names
from rlhf.cli import main
from rlhf.recipe import Recipe


@dataclass
class Fake:
    """A cluster that remembers what it was given; every job is in the same state, but for those in `states`."""

    now: tuple[jobs.State, str] = (jobs.State.RUNNING, "")
    refuses: BaseException | None = None
    unknown: str = ""
    states: dict[str, tuple[jobs.State, str]] = field(default_factory=dict)
    given: list[tuple[Ticket, Recipe]] = field(default_factory=list)

    def render(self, ticket: Ticket, recipe: Recipe) -> str:
        return f"{ticket.cluster.to} {recipe.seed}\n"

    def submit(self, ticket: Ticket, recipe: Recipe) -> str:
        self.given.append((ticket, recipe))
        if self.refuses is not None:
            raise self.refuses
        return f"native-{len(self.given)}"

    def state(self, ticket: Ticket) -> tuple[jobs.State, str]:
        if self.unknown:
            raise UnknownJobError(f"{self.unknown} knows no job {ticket.native!r}")
        return self.states.get(ticket.native, self.now)

    def logs(self, ticket: Ticket, follow: bool) -> Iterator[str]:
        yield from ("one\n", "two\n" if follow else "")

    def stop(self, ticket: Ticket) -> None:
        self.state(ticket)
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


def submitted(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["submit", "digits.toml", *more]) == 0
    return capsys.readouterr().out.strip()


def test_a_damaged_ticket_is_one_unknown_job(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    job = submitted(capsys)
    folder = Path("runs/.jobs")
    (folder / "torn.json").write_text("{")
    (folder / "folder.json").mkdir()
    (folder / "link.json").symlink_to("nothing")
    found = {one.job: one for one in jobs.list_jobs(Path("runs"))}
    assert found.keys() == {job, "torn", "folder", "link"}
    assert found[job].state is jobs.State.RUNNING
    for name, why in (("torn", "damaged"), ("folder", "cannot be read"), ("link", "a link to nothing")):
        assert (found[name].to, found[name].state) == ("", None)
        assert found[name].why.startswith(f"runs/.jobs/{name}.json: {why}")
        assert found[name].why.endswith(
            f"; the job may still run: look for '{name}' on its cluster, then remove the file"
        )
    assert main(["list"]) == 0
    assert main(["status", "nosuch"]) == 1
    assert "runs/.jobs has no job 'nosuch'" in capsys.readouterr().err


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
    for name in ("one", "two"):
        assert main(["submit", "digits.toml", "-o", f"name = '{name}'"]) == 0
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


@pytest.mark.parametrize(
    "refused",
    [jobs.JobError("no such queue"), PermissionError(13, "Permission denied", "secret.txt"), TypeError("of ours")],
)
def test_a_job_that_was_not_handed_over_leaves_no_ticket(
    cluster: Fake, capsys: pytest.CaptureFixture[str], refused: Exception
) -> None:
    cluster.refuses = refused
    if isinstance(refused, TypeError):
        with pytest.raises(TypeError):
            main(["submit", "digits.toml"])
    else:
        assert main(["submit", "digits.toml"]) == 1
        shown = capsys.readouterr().err
        assert ("no such queue" if isinstance(refused, jobs.JobError) else "secret.txt") in shown
        assert "no ticket can be kept" not in shown
    assert names(Path("runs")) == []


def timed_out() -> jobs.JobError:
    error = jobs.JobError("it did not answer")
    error.__cause__ = subprocess.TimeoutExpired("sbatch", 60)
    return error


@pytest.mark.parametrize(("refused", "status"), [(timed_out(), 1), (KeyboardInterrupt(), 130)])
def test_a_job_that_was_perhaps_handed_over_is_not_forgotten(
    cluster: Fake, capsys: pytest.CaptureFixture[str], refused: BaseException, status: int
) -> None:
    cluster.refuses = refused
    for to, look in (
        ("slurm", "`squeue --name={job}` and `sacct --name={job}` tell, and `scancel --name={job}` ends it"),
        ("kuberay", "`rlhf status {job}` tells, and `rlhf stop {job}` ends it"),
        ("ray", "`rlhf status {job}` tells, and `rlhf stop {job}` ends it"),
    ):
        assert main(["submit", "digits.toml", "--to", to, "--runs", to]) == status
        (job,) = names(Path(to))
        assert f"job {job!r} was perhaps handed over: {look.format(job=job)}" in capsys.readouterr().err
        assert main(["submit", "digits.toml", "--to", to, "--runs", to]) == 1  # which would be a second one
        assert "two cannot share its run folder" in capsys.readouterr().err
        assert len(cluster.given) == 1
        cluster.given.clear()
    (job,) = names(Path("slurm"))
    assert [(found.to, found.state) for found in jobs.list_jobs(Path("slurm"))] == [("slurm", None)]
    for verb in ("status", "logs", "stop"):
        assert main([verb, job, "--runs", "slurm"]) == 1
        assert f"squeue --name={job}" in capsys.readouterr().err


def test_a_job_on_its_way_is_known_by_the_name_it_will_have(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.refuses, cluster.unknown = timed_out(), "the head"
    assert main(["submit", "digits.toml"]) == 1
    (job,) = names(Path("runs"))
    assert main(["status", job]) == 1
    assert (
        f"{job!r} is being submitted, or was never handed over (the head knows no job {job!r})"
        in capsys.readouterr().err
    )
    cluster.refuses, cluster.unknown = None, ""
    assert jobs.status(job, Path("runs")).state is jobs.State.RUNNING
    cluster.unknown = "the head"
    assert main(["stop", job]) == 0  # and is no more taken to be on its way
    assert jobs.status(job, Path("runs")).ended
    capsys.readouterr()
    assert submitted(capsys) != job


def test_what_a_head_has_forgotten_has_ended(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    job = submitted(capsys)
    cluster.unknown = "the head"
    why = f"the head knows no job 'native-1'; `rlhf resubmit {job}` continues it"
    assert jobs.status(job, Path("runs")) == jobs.Found(job, "ray", jobs.State.FAILED, why)
    assert main(["stop", job]) == 0
    assert main(["resubmit", job]) == 0


def test_a_run_folder_has_one_job(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    first = submitted(capsys)
    assert main(["submit", "digits.toml", "-o", "seed = 4"]) == 1
    folder = Path("runs/think-fusion-digits").absolute()
    refused = f"job {first!r} is running, and two cannot share its run folder, {folder}; `rlhf stop {first}` ends it"
    assert refused in capsys.readouterr().err
    submitted(capsys, "-o", "name = 'another'")
    cluster.states["native-1"] = (jobs.State.PREEMPTED, "")
    assert main(["resubmit", first]) == 0
    second = capsys.readouterr().out.strip()
    assert main(["resubmit", first]) == 1  # which the second continues
    assert f"job {second!r} is running, and two cannot share its run folder" in capsys.readouterr().err


def test_of_two_submits_at_once_one_sees_the_other(
    cluster: Fake, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, runs, look = Ticket.of(recipe, [], [], Path("runs")), Path("runs"), jobs._require_alone

    def overtaken(ticket: Ticket, runs: Path) -> None:
        look(ticket, runs)
        if ticket == first:
            with pytest.raises(jobs.JobError, match=f"job '{first.job}' is running, and two cannot share"):
                jobs.submit(first.again(), recipe, runs)

    monkeypatch.setattr(jobs, "_require_alone", overtaken)
    jobs.submit(first, recipe, runs)
    assert names(runs) == [first.job]  # what was refused leaves no ticket


@pytest.mark.parametrize("to", ["slurm", "ray"])
def test_what_may_be_running_is_no_advice_to_stop_in_vain(
    cluster: Fake, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    cluster.refuses, cluster.unknown = timed_out(), "the head"
    assert main(["submit", "digits.toml", "--to", to]) == 1
    (job,) = names(Path("runs"))
    capsys.readouterr()
    assert main(["submit", "digits.toml", "--to", to]) == 1
    shown = capsys.readouterr().err
    assert f"`rlhf stop {job}` ends it" not in shown
    assert shown.count(f"remove runs/.jobs/{job}.json") == 1
    assert (f"scancel --name={job}" if to == "slurm" else f"`rlhf stop {job}` gives it up") in shown


def test_a_damaged_ticket_keeps_others_from_its_run_folder(cluster: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    job = submitted(capsys)
    ticket = Path(f"runs/.jobs/{job}.json")
    ticket.write_text("{")
    assert main(["submit", "digits.toml"]) == 1
    shown = capsys.readouterr().err
    assert f"job {job!r} is unknown, and two cannot share its run folder" in shown
    assert f"look for {job!r} on its cluster, then remove the file" in shown
    submitted(capsys, "-o", "name = 'think-fusion'")  # of which the other's name is no job's
    ticket.unlink()
    submitted(capsys)
