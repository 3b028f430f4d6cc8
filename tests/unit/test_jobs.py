"""Tickets of jobs, and a Jobs API that does not answer."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from actors import jobs
from actors.jobs import ray_cluster
from actors.jobs.backend import UnknownJobError
from actors.jobs.head import Head, find_head, start_head
from actors.jobs.ticket import Ticket, find, keep, names
from rlhf.checkpoint import write_json
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


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "small.toml").write_text(RECIPE)
    return load([tmp_path / "small.toml"])


def addressed(ticket: Ticket, address: str) -> Ticket:
    cluster = ClusterTable.model_validate({"ray": {"address": address}})
    return replace(ticket, cluster=cluster, native=ticket.job)


def submitted(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["submit", "digits.toml", *more]) == 0
    return capsys.readouterr().out.strip()


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


def test_tickets_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / ".jobs").write_text("a file")
    for verb in (lambda: jobs.list_jobs(tmp_path), lambda: jobs.status("any", tmp_path)):
        with pytest.raises(jobs.JobError, match=r"\.jobs.*: cannot be read \(Not a directory\)"):
            verb()


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
    assert found.why == f"no Ray head of {tmp_path} is up; `rlhf resubmit {ticket.job}` continues it"


def test_a_job_whose_private_head_is_not_up_yet_has_not_ended(recipe: Recipe, tmp_path: Path) -> None:
    ticket = Ticket.of(recipe, ["small.toml"], [], tmp_path)
    keep(ticket, tmp_path)
    with pytest.raises(jobs.JobError, match=rf"being submitted, or was never handed over \(no Ray head of {tmp_path}"):
        jobs.status(ticket.job, tmp_path)
    with pytest.raises(jobs.JobError, match="two cannot share its run folder"):
        jobs.submit(ticket.again(), recipe, tmp_path)


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
        ticket = jobs.Ticket.of(recipe, files, [*overrides, *more, "seed = 3"], tmp_path / "runs")
        assert "secret" not in " ".join(ticket.arguments())
        assert "seed = 3" in ticket.arguments()
        if refused:
            with pytest.raises(jobs.JobError, match=r"may not see .*cluster\.runs"):
                jobs.render(ticket, recipe, tmp_path / "runs")
        else:
            assert "--runs /shared/runs" in jobs.render(ticket, recipe, tmp_path / "runs")


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


@pytest.mark.parametrize(
    "address", ["127.0.0.1:23765", "", "http://", "ray://h:1", "http://[::1", "http://h:99999", "http://h:x"]
)
@pytest.mark.parametrize("runs", [None, "/shared/runs"])
def test_an_address_that_is_none_is_refused_before_it_is_asked(
    recipe: Recipe, tmp_path: Path, address: str, runs: str | None
) -> None:
    ticket = addressed(Ticket.of(recipe, [], [], tmp_path), address)
    ticket = replace(ticket, cluster=ticket.cluster.model_copy(update={"runs": runs}))
    with pytest.raises(jobs.JobError, match=r"cluster.ray.address = .*: give the head's dashboard as http://HOST:PORT"):
        jobs.render(ticket, recipe, tmp_path)
    keep(ticket, tmp_path)
    assert "give the head's dashboard" in jobs.list_jobs(tmp_path)[0].why


@pytest.mark.parametrize("runs", ["", "shared/x"])
def test_run_folders_of_another_machine_have_a_whole_path(recipe: Recipe, tmp_path: Path, runs: str) -> None:
    cluster = ClusterTable.model_validate({"runs": runs, "ray": {"address": "http://192.0.2.7:8265"}})
    told = recipe.model_copy(update={"cluster": cluster})
    ticket = Ticket.of(told, [], [], tmp_path / "runs")
    assert Path(ticket.runs).is_absolute()
    with pytest.raises(jobs.JobError, match=rf"cluster.runs = '{runs}' must be the path at which all nodes"):
        jobs.render(ticket, told, tmp_path)


@pytest.mark.parametrize("port", [99999, -4, 0])
def test_a_port_is_a_number_of_sixteen_bits(tmp_path: Path, port: int) -> None:
    with pytest.raises(jobs.JobError, match=f"--port {port}: a port is a number from 1 to 65535"):
        start_head(tmp_path / "head", port)
    assert not (tmp_path / "head").exists()


def test_a_head_that_cannot_keep_its_token(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(jobs.JobError, match=r"file.*: cannot be written \(.*\), and a Ray head keeps its token"):
        start_head(tmp_path / "file", free_port())


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_damaged_description_of_a_head_is_named(recipe: Recipe, tmp_path: Path, text: str) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "head.json").write_text(text)
    with pytest.raises(jobs.JobError, match=r"head.json: damaged .*; end the Ray head"):
        find_head(tmp_path / ".ray")
    keep(replace(Ticket.of(recipe, [], [], tmp_path), native="x"), tmp_path)
    (found,) = jobs.list_jobs(tmp_path)
    assert found.why.startswith(f"{tmp_path}/.ray/head.json: damaged")


@pytest.mark.parametrize("text", ["", "{}", '{"state": "odd", "why": ""}', '{"state": "stopped", "why": "told"}'])
def test_what_became_of_a_job_is_read_or_said_to_be_damaged(recipe: Recipe, tmp_path: Path, text: str) -> None:
    ticket = replace(Ticket.of(recipe, [], [], tmp_path), native="x")
    keep(ticket, tmp_path)
    (tmp_path / ".ray" / "ended").mkdir(parents=True)
    (tmp_path / ".ray" / "ended" / "x.json").write_text(text)
    (found,) = jobs.list_jobs(tmp_path)
    if "told" in text:
        assert (found.state, found.why) == (jobs.State.STOPPED, "told")
    else:
        assert found.why.startswith(f"{tmp_path}/.ray/ended/x.json: damaged")
        assert found.why.endswith("remove it: the job then counts as failed")


def test_a_stop_where_the_private_head_has_ended_has_nothing_to_do(recipe: Recipe, tmp_path: Path) -> None:
    ticket = Ticket.of(recipe, [], [], tmp_path)
    keep(replace(ticket, native=ticket.job), tmp_path)
    assert jobs.stop(ticket.job, tmp_path).ended
    with pytest.raises(
        jobs.JobError, match=rf"has ended, and job .* with it; `rlhf resubmit {ticket.job}` continues it"
    ):
        list(jobs.logs(ticket.job, tmp_path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def answering(answers: dict[str, tuple[int, str]]) -> Iterator[str]:
    """An HTTP server; of a path without an answer the connection is dropped."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text = next((answer for path, answer in answers.items() if self.path.startswith(path)), (0, ""))
            if status:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - names of http.server

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


VERSION = {"/api/version": (200, '{"ray_version": "2.60.0", "version": "4", "ray_commit": "x", "session_name": "s"}')}


def test_a_head_that_has_forgotten_a_job_says_so(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_token(monkeypatch)
    with answering({**VERSION, "/api/jobs/": (404, "no such job")}) as address:
        ticket = addressed(Ticket.of(recipe, [], [], tmp_path), address)
        keep(ticket, tmp_path)
        assert jobs.status(ticket.job, tmp_path).state is jobs.State.FAILED
        assert jobs.stop(ticket.job, tmp_path).why.endswith(f"`rlhf resubmit {ticket.job}` continues it")


def test_a_stop_ends_a_private_head_that_no_job_came_to(recipe: Recipe, tmp_path: Path) -> None:
    ticket = Ticket.of(recipe, [], [], tmp_path)
    keep(ticket, tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "token").write_text("0" * 64)
    none = {f"/api/jobs/{ticket.job}": (404, "no such job"), "/api/jobs/": (200, "[]")}
    with answering({**VERSION, **none}) as address, subprocess.Popen(["sleep", "60"]) as process:
        created = psutil.Process(process.pid).create_time()
        head = Head(address, str(tmp_path / ".ray" / "token"), process.pid, created, str(tmp_path / "temporary"))
        write_json(tmp_path / ".ray" / "head.json", asdict(head))
        try:
            assert jobs.stop(ticket.job, tmp_path).ended
            assert find_head(tmp_path / ".ray") is None
        finally:
            process.kill()


def test_a_job_whose_post_is_not_answered_was_perhaps_handed_over(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_token(monkeypatch)
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    with answering({**VERSION, "/api/packages/": (200, "{}")}) as address:
        ticket = replace(addressed(Ticket.of(recipe, [], [], tmp_path), address), native="")
        with pytest.raises(jobs.JobError, match=rf"does not answer.*; job '{ticket.job}' was perhaps handed over"):
            jobs.submit(ticket, recipe, tmp_path)
    assert names(tmp_path) == [ticket.job]
    with answering({}) as address:  # not even asked to take the job
        ticket = replace(addressed(ticket.again(), address), native="", recipe="another")
        with pytest.raises(jobs.JobError, match="does not answer"):
            jobs.submit(ticket, recipe, tmp_path)
    assert len(names(tmp_path)) == 1


def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_a_token_that_is_refused_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_token(monkeypatch)
    path = tmp_path / "token"
    with answering({"/": (403, "Forbidden: invalid authentication token")}) as address:
        ticket = addressed(Ticket.of(recipe, [], [], tmp_path), address)
        keep(ticket, tmp_path)

        def said(**variables: str) -> str:
            with monkeypatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                return jobs.list_jobs(tmp_path)[0].why

        assert "asks for a token, and none is given; set RAY_AUTH_TOKEN_PATH" in said()
        assert "of a head of ours" not in said()
        assert "refuses the token in RAY_AUTH_TOKEN; correct it, or unset it" in said(RAY_AUTH_TOKEN="0")
        path.write_text("0")
        assert f"refuses the token of RAY_AUTH_TOKEN_PATH = {path}" in said(RAY_AUTH_TOKEN_PATH=str(path))
        path.write_text("")
        assert said(RAY_AUTH_TOKEN_PATH=str(path)).startswith(
            f"RAY_AUTH_TOKEN_PATH = {path}: what should be a token is empty"
        )
        path.write_bytes(b"\xff")
        assert "is not one line of ASCII" in said(RAY_AUTH_TOKEN_PATH=str(path))
        assert said(RAY_AUTH_TOKEN="é€").startswith("RAY_AUTH_TOKEN: what should be a token is not one line of ASCII")


def test_why_a_head_does_not_answer(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_token(monkeypatch)
    with answering(VERSION) as address:
        for wrong, cause in ((f"http://127.0.0.1:{free_port()}", "refused"), (address.replace("http", "https"), "SSL")):
            ticket = addressed(Ticket.of(recipe, [], [], tmp_path), wrong)
            keep(ticket, tmp_path)
            with pytest.raises(jobs.JobError, match=rf"does not answer; is it running, .*\(.*{cause}.*\)"):
                jobs.status(ticket.job, tmp_path)
