"""Jobs of a Ray cluster: heads that are gone, silent or damaged, tokens, and what another machine cannot see."""

from __future__ import annotations

import contextlib
import http.server
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from actors import jobs
from actors.jobs import ray_cluster
from actors.jobs.head import Head, find_head, start_head
from actors.jobs.ticket import Ticket, keep, names
from actors.nodes import port as free_port
from rlhf.checkpoint import write_json
from rlhf.recipe import ClusterTable, Recipe, load


def addressed(ticket: Ticket, address: str) -> Ticket:
    cluster = ClusterTable.model_validate({"ray": {"address": address}})
    return replace(ticket, cluster=cluster, native=ticket.job)


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
    for verb in (jobs.status, lambda *of: list(jobs.logs(*of))):
        with pytest.raises(jobs.JobError, match=rf"or was never handed over \(no Ray head of {tmp_path} is up"):
            verb(ticket.job, tmp_path)
    with pytest.raises(jobs.JobError, match="two cannot share its run folder"):
        jobs.submit(ticket.again(), recipe, tmp_path)


def test_a_driver_that_was_told_to_go_is_preempted() -> None:
    from ray.job_submission import JobInfo, JobStatus

    def ended(status: int) -> tuple[jobs.State, str]:
        return ray_cluster._state(JobInfo(JobStatus.FAILED, "run", message="the log's end", driver_exit_code=status))

    assert ended(75) == (jobs.State.PREEMPTED, "it left a checkpoint for `rlhf resubmit`")
    assert ended(3) == (jobs.State.FAILED, "exit status 3, and `rlhf logs` says why")


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
    with pytest.raises(jobs.JobError, match=f"no Ray head of {tmp_path} is up; `rlhf resubmit {ticket.job}`"):
        list(jobs.logs(ticket.job, tmp_path))


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
