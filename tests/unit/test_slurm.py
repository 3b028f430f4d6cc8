"""Jobs of Slurm: what is rendered, and what its script does with a Slurm, a Ray and a driver that only write down how
they were called."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actors import jobs, nodes
from actors.jobs import JobError, State, Ticket
from actors.jobs import slurm as backend
from actors.jobs.slurm import Slurm
from actors.jobs.ticket import names
from rlhf.recipe import Recipe, load
from tests.unit.toy_recipe import ONLY

ROOT = Path(__file__).parents[2]
SITE = ROOT / "recipes" / "sites" / "slurm.toml"
RECIPE = f"""
name = "small"
model.path = "some/model"
deadlines.start = 5
{ONLY}"""
CLUSTER = {"to": "slurm", "nodes": [{"count": 2, "cpus": 4, "memory_gib": 8, "gpus": 1}], "grace_seconds": 10}
# What stands in for the commands of a cluster. Each appends how it was called to $CALLS.
FAKES = {
    # tasks as Slurm starts them, one a node; signals go on to them
    "srun": """
echo "srun $*" >>"$CALLS"
count=1 tasks=()
while [[ $1 == --* ]]; do [[ $1 != --ntasks=* ]] || count=${1#*=}; shift; done
trap 'kill -USR2 "${tasks[@]}" 2>/dev/null || true' USR2
set -m # each with what it starts is a process group, which is what Slurm signals
for ((id = 0; id < count; id++)); do SLURM_NODEID=$id "$@" & tasks+=($!); done
printf '%s\\n' "${tasks[@]}" >"$JOINED/tasks"
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
done
echo "srun ended" >>"$CALLS"
""",
    "scontrol": """
echo "scontrol $*" >>"$CALLS"
if [[ $1 == show ]]; then printf '%s\\n' node-a node-b; fi
""",
    # blocks until it is told to end, with a child as Ray has some; a file a node that has joined
    "ray": """
echo "ray $* auth=$RAY_AUTH_MODE several=$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" >>"$CALLS"
for argument; do [[ $argument != --temp-dir=* ]] || temporary=${argument#*=}; done
[[ $* != *--head* || -n ${HEAD_FAILS-} ]] || echo 10.0.0.1:6379 >"$temporary/ray_current_cluster"
[[ $* == *--head* || -z ${WORKER_FAILS-} ]] || exit 1
[[ $* != *--head* || -z ${HEAD_FAILS-} ]] || exit 1
touch "$JOINED/$SLURM_NODEID"
sleep 300 & echo $! >>"$JOINED/pids"
trap 'rm -f "$JOINED/$SLURM_NODEID"; echo "ray ended $SLURM_NODEID" >>"$CALLS"; exit 0' TERM
wait
""",
    "rlhf": """
echo "rlhf $*" >>"$CALLS"
ls "$JOINED" | grep -c '^[0-9]' >>"$CALLS"
stat -c '%a' "$RAY_AUTH_TOKEN_PATH" >>"$CALLS"
wc -c <"$RAY_AUTH_TOKEN_PATH" >>"$CALLS"
trap 'echo "rlhf told" >>"$CALLS"; kill $!; exit 75' TERM
sleep "${DRIVER_SECONDS-0}" &
touch "$JOINED/driver"
wait
exit "${DRIVER_STATUS-0}"
""",
    # actors.nodes: its question about addresses, and its wait, against the fake's files
    "python": """
if [[ $3 == address ]]; then echo 10.0.0.2; exit; fi
if [[ $3 == port ]]; then echo 4321; exit; fi
for ((i = 0; i < 30; i++)); do
  [[ ! -s $4 ]] || (($(ls "$JOINED" | grep -c '^[0-9]') < $5)) || exit 0
  sleep 0.1
done
echo "rlhf: $(ls "$JOINED" | grep -c '^[0-9]') of $5 nodes joined" >&2
exit 1
""",
}


@dataclass
class Site:
    """A folder to work in, a PATH with fakes, and what they were called with."""

    folder: Path
    environment: dict[str, str]

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def fake(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    (tmp_path / "bin").mkdir()
    (tmp_path / "joined").mkdir()
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "JOINED": str(tmp_path / "joined"),
        "SLURM_JOB_ID": f"test{os.getpid()}{tmp_path.name}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    made = Site(tmp_path, environment)
    for name, body in FAKES.items():
        made.fake(name, body)
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return made


def make(folder: Path, cluster: Mapping[str, Any] = CLUSTER, name: str = "small") -> tuple[Ticket, Recipe]:
    (folder / "small.toml").write_text(RECIPE)
    recipe = load([folder / "small.toml"], [f"name = '{name}'"])
    recipe = recipe.model_copy(update={"cluster": type(recipe.cluster).model_validate(cluster)})
    return replace(Ticket.of(recipe, ["small.toml"], ["seed = 1"], folder / "the runs"), folder=str(folder)), recipe


def script_of(site: Site, **cluster: Any) -> Path:
    path = site.folder / "batch.sh"
    path.write_text(Slurm().render(*make(site.folder, {**CLUSTER, **cluster})))
    return path


def start(site: Site, script: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(script)],
        env=site.environment | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=60)
    return printed


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_nothing_is_left(site: Site) -> None:
    assert [call for call in site.calls if call.startswith("ray ended")], site.calls
    assert "srun ended" in site.calls
    assert not list((site.folder / "the runs" / "small").glob(".slurm-*"))
    assert not list(Path("/tmp").glob(f"rlhf-{site.environment['SLURM_JOB_ID']}-*"))
    for pid in (site.folder / "joined" / "pids").read_text().split():
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_a_script_says_what_the_job_may_have(tmp_path: Path) -> None:
    cluster = {
        **CLUSTER,
        "queue": "gpu",
        "priority": "high",
        "hours": 1.5,
        "slurm": {"account": "a team", "options": {"constraint": "h100", "exclusive": ""}, "setup": ["module load x"]},
    }
    ticket, recipe = make(tmp_path, cluster)
    text = Slurm().render(ticket, recipe)
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        f"job-name={ticket.job}",
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=4",
        "mem=8192M",
        "gpus-per-node=1",
        "time=01:30:00",
        "partition=gpu",
        "qos=high",
        "account='a team'",
        f"output='{tmp_path}/the runs/small/{ticket.job}.log'",
        "open-mode=append",
        "signal=B:USR1@70",
        "constraint=h100",
        "exclusive",
        "requeue",
    ]
    assert "setup() {\n  module load x\n}" in text
    assert f"folder='{tmp_path}/the runs/small'" in text


@pytest.mark.parametrize("count", [1, 3])
def test_shellcheck_finds_nothing(tmp_path: Path, count: int) -> None:
    cluster = {**CLUSTER, "nodes": [{"count": count, "cpus": 4, "memory_gib": 8}]}
    (tmp_path / "batch.sh").write_text(Slurm().render(*make(tmp_path, cluster)))
    linter = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([linter, tmp_path / "batch.sh"], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


def test_the_site_file_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = ["recipes/think_fusion_digits.toml"]
    recipe = load([*files, SITE])
    assert "#SBATCH --nodes=" in Slurm().render(Ticket.of(recipe, files, [], tmp_path), recipe)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"nodes": []}, "cluster.nodes.. is not given"),
        ({"nodes": [CLUSTER["nodes"][0], {"cpus": 1, "memory_gib": 1}]}, "2 kinds of machine"),  # type: ignore[index]
        ({"slurm": {"options": {"mem": "8G"}}}, "slurm.options.mem: this one is made of other keys"),
        (
            {"slurm": {"options": {"array": "1-4"}}},
            "slurm.options.array: the jobs of an array would share one run folder",
        ),
        ({"slurm": {"options": {"-p": "gpu"}}}, "slurm.options.-p: this is no long name of an option"),
        ({"queue": "a\nb"}, "partition = .* has a line break"),
        ({"hours": 0.01}, "cluster.hours = 0.01 is no longer than the 70 s"),
    ],
)
def test_what_slurm_cannot_be_asked_is_refused(tmp_path: Path, cluster: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        Slurm().render(*make(tmp_path, {**CLUSTER, **cluster}))


def test_a_job_runs_on_all_nodes_and_leaves_nothing(site: Site) -> None:
    process = start(site, script_of(site))
    printed = ended(process)
    assert process.returncode == 0, printed
    (head,) = (call for call in site.calls if call.startswith("ray start --head"))
    (worker,) = (call for call in site.calls if call.startswith("ray start --block"))
    assert "--port=0 --node-ip-address=10.0.0.2 " in head
    assert "--address=10.0.0.1:6379 " in worker
    resources = "--num-cpus=4 --num-gpus=1 --object-store-memory=2576980377 --memory=6012954215"
    for call in (head, worker):
        assert call.endswith(f"{resources} auth=token several=1")
    driver = next(place for place, call in enumerate(site.calls) if call.startswith("rlhf run"))
    said = "\n".join(site.calls[driver:])
    assert said.startswith("rlhf run small.toml -o seed = 1 -o [cluster]\n")
    assert f"--runs {site.folder}/the runs --address 10.0.0.1:6379\n2\n600\n64\n" in said  # nodes, mode, token
    assert "scontrol requeue" not in said
    assert_nothing_is_left(site)


def test_one_node_stays_on_loopback(site: Site) -> None:
    process = start(site, script_of(site, nodes=[{"cpus": 2, "memory_gib": 4}]))
    assert ended(process) is not None
    assert process.returncode == 0
    (head,) = (call for call in site.calls if call.startswith("ray start"))
    assert "--node-ip-address=127.0.0.1 " in head
    assert head.endswith("several=0")
    assert_nothing_is_left(site)


def test_what_the_driver_ends_with_is_what_the_job_ends_with(site: Site) -> None:
    process = start(site, script_of(site), DRIVER_STATUS="3")
    ended(process)
    assert process.returncode == 3
    assert not [call for call in site.calls if "requeue" in call]
    assert_nothing_is_left(site)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_go_is_queued_again(site: Site, number: signal.Signals) -> None:
    process = start(site, script_of(site), DRIVER_SECONDS="60")
    until(lambda: (site.folder / "joined" / "driver").exists())
    process.send_signal(number)
    printed = ended(process)
    assert "rlhf told" in site.calls
    assert f"scontrol requeue {site.environment['SLURM_JOB_ID']}" in site.calls
    order = [call for call in site.calls if call in ("rlhf told", "srun ended") or "requeue" in call]
    assert order.index("srun ended") == 1  # Ray lives until the driver has saved, and no longer than the job
    assert "queued again" in printed
    assert process.returncode == 75
    assert_nothing_is_left(site)


def test_a_notice_to_the_nodes_alone_reaches_the_driver_first(site: Site) -> None:
    process = start(site, script_of(site), DRIVER_SECONDS="60")
    until(lambda: (site.folder / "joined" / "driver").exists())
    for task in (site.folder / "joined" / "tasks").read_text().split():
        os.killpg(int(task), signal.SIGTERM)  # as Slurm signals the steps of what it preempts
    ended(process)
    order = [call for call in site.calls if call == "rlhf told" or call.startswith("ray ended")]
    assert order[0] == "rlhf told"
    assert sorted(order[1:]) == ["ray ended 0", "ray ended 1"]
    assert [call for call in site.calls if "scontrol requeue" in call]
    assert process.returncode == 75
    assert_nothing_is_left(site)


def test_a_job_that_is_stopped_is_not_queued_again(site: Site) -> None:
    process = start(site, script_of(site), DRIVER_SECONDS="60")
    until(lambda: (site.folder / "joined" / "driver").exists())
    process.send_signal(signal.SIGINT)
    ended(process)
    assert "rlhf told" in site.calls
    assert not [call for call in site.calls if "requeue" in call]
    assert process.returncode == 76
    assert_nothing_is_left(site)


def test_a_node_that_does_not_join_is_told_of(site: Site) -> None:
    process = start(site, script_of(site), WORKER_FAILS="yes")
    printed = ended(process)
    assert process.returncode == 1
    assert "1 of 2 nodes joined" in printed
    assert f"rlhf: Ray did not start on 2 node(s); {site.folder}/the runs/small/small-" in printed
    assert not [call for call in site.calls if call.startswith("rlhf")]
    assert_nothing_is_left(site)


def test_a_script_that_fails_on_its_way_leaves_nothing(site: Site) -> None:
    site.fake("scontrol", "exit 1")
    process = start(site, script_of(site))
    ended(process)
    assert process.returncode == 1
    assert not [call for call in site.calls if call.startswith(("ray", "rlhf"))]
    assert not list((site.folder / "the runs" / "small").glob(".slurm-*"))


def test_a_script_that_is_started_again_does_not_use_what_is_left(site: Site) -> None:
    left = site.folder / "the runs" / "small" / f".slurm-{site.environment['SLURM_JOB_ID']}"
    left.mkdir(parents=True)
    (left / "address").write_text("1.2.3.4:5")
    process = start(site, script_of(site))
    ended(process)
    assert process.returncode == 0
    assert not [call for call in site.calls if "1.2.3.4" in call]


def test_setup_runs_everywhere_and_may_be_careless(site: Site) -> None:
    setup = ['echo "set up $SLURM_NODEID" >>"$CALLS"', ': "$NOBODY_SET_THIS"']
    process = start(site, script_of(site, slurm={"setup": setup}), SLURM_NODEID="batch")
    ended(process)
    assert process.returncode == 0
    assert sorted(call for call in site.calls if call.startswith("set up")) == [
        "set up 0",
        "set up 1",
        "set up batch",
    ]


def test_a_node_knows_by_which_address_it_is_reached(capsys: pytest.CaptureFixture[str]) -> None:
    assert nodes.main(["address", "127.0.0.1"]) == 0
    assert capsys.readouterr().out == "127.0.0.1\n"
    assert nodes.main(["port"]) == 0
    with socket.socket() as free:
        free.bind(("", int(capsys.readouterr().out)))
    assert nodes.main(["anything"]) == 2


def test_a_head_that_does_not_come_up_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address, ours = str(tmp_path / "address"), str(os.getpid())
    assert nodes.main(["join", address, "2", "0.6", ours]) == 1
    assert "rlhf: the head did not come up within 0.6 s" in capsys.readouterr().err
    with subprocess.Popen(["true"]) as over:
        pass
    assert nodes.main(["join", address, "2", "60", str(over.pid)]) == 1
    assert "what starts Ray on the nodes has ended: the head did not come up" in capsys.readouterr().err


def test_a_job_is_handed_to_sbatch(site: Site) -> None:
    site.fake("sbatch", 'echo "sbatch $*" >>"$CALLS"; cat >"$CALLS.script"; echo "17;cluster"')
    ticket, recipe = make(site.folder)
    assert Slurm().submit(ticket, recipe) == "17"
    assert site.calls == ["sbatch --parsable"]
    assert (site.folder / "calls.script").read_text() == Slurm().render(ticket, recipe)
    assert (site.folder / "the runs" / "small").is_dir()


def test_where_there_is_no_slurm(site: Site) -> None:
    with pytest.raises(JobError, match="there is no sbatch here: submit from a login node"):
        Slurm().submit(*make(site.folder))
    assert not (site.folder / "the runs").exists()


def test_a_slurm_that_says_no_is_quoted(site: Site) -> None:
    site.fake("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(JobError, match=r"^sbatch ended with status 1: .*invalid partition"):
        Slurm().submit(*make(site.folder))


def test_a_job_that_the_controller_perhaps_took_is_not_forgotten(site: Site) -> None:
    said = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    site.fake("sbatch", f"echo '{said}' >&2; exit 1")
    ticket, recipe = make(site.folder)
    with pytest.raises(JobError, match=rf"Socket timed out .*; job '{ticket.job}' was perhaps handed over"):
        jobs.submit(ticket, recipe, site.folder)
    assert names(site.folder) == [ticket.job]


@pytest.mark.parametrize(
    ("queued", "accounted", "state", "why"),
    [
        ("PENDING|Resources", "", State.WAITING, "in Slurm's queue: Resources"),
        ("PENDING|None", "", State.WAITING, "in Slurm's queue: not looked at yet"),
        ("RUNNING|None", "", State.RUNNING, ""),
        ("COMPLETING|None", "", State.RUNNING, "completing"),
        ("RESIZING|None", "", State.RUNNING, "resizing"),  # whatever is in the queue has not ended
        ("NODE_FAIL|None", "", State.FAILED, "node fail"),
        ("", "COMPLETED|0:0", State.SUCCEEDED, ""),
        ("", "FAILED|3:0", State.FAILED, "exit status 3"),
        ("", "FAILED|76:0", State.STOPPED, "it was stopped"),
        ("", "FAILED|75:0", State.PREEMPTED, "it was not queued again"),
        ("", "CANCELLED by 1000|0:15", State.STOPPED, "cancelled by 1000"),
        ("", "PREEMPTED|0:15", State.PREEMPTED, "preempted"),
        ("", "OUT_OF_MEMORY|0:125", State.FAILED, "out of memory"),
        ("", "TIMEOUT|0:0", State.FAILED, "timeout"),
    ],
)
def test_states(site: Site, queued: str, accounted: str, state: State, why: str) -> None:
    site.fake("squeue", f"echo '{queued}'" if queued else "echo 'slurm_load_jobs error: Invalid job id' >&2; exit 1")
    site.fake("sacct", f"echo '{accounted}'")
    ticket, _ = make(site.folder)
    assert Slurm().state(replace(ticket, native="17")) == (state, why)


@pytest.mark.parametrize(
    ("shown", "state", "why"),
    [
        (
            "echo 'JobId=17 JobName=a JobState=FAILED Reason=None ExitCode=3:0 Command=(null)'",
            State.FAILED,
            "exit status 3",
        ),
        ("echo 'JobId=17 JobState=FAILED ExitCode=75:0'", State.PREEMPTED, "it was not queued again"),
        ("echo 'JobId=17 JobState=COMPLETED ExitCode=0:0'", State.SUCCEEDED, ""),
        (
            "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
            State.FAILED,
            "Slurm keeps no accounts, so how it ended is not known",
        ),
    ],
)
def test_states_without_accounts(site: Site, shown: str, state: State, why: str) -> None:
    site.fake("squeue", "exit 0")
    site.fake("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    site.fake("scontrol", shown)
    ticket = replace(make(site.folder)[0], native="17")
    assert Slurm().state(ticket) == (state, why)
    site.fake("sacct", "echo 'Unable to connect to database' >&2; exit 1")
    with pytest.raises(JobError, match="Unable to connect"):
        Slurm().state(ticket)


def test_a_job_that_nobody_knows(site: Site) -> None:
    site.fake("squeue", "exit 0")
    site.fake("sacct", "exit 0")
    ticket, _ = make(site.folder)
    with pytest.raises(JobError, match="neither squeue nor sacct knows job 17"):
        Slurm().state(replace(ticket, native="17"))


def test_a_slurm_that_does_not_answer_is_no_end_of_a_job(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.fake("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    ticket = replace(make(site.folder)[0], native="17")
    with pytest.raises(JobError, match="Unable to contact"):
        Slurm().state(ticket)


def test_logs_are_read_and_followed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(backend, "ASK_SECONDS", 0.0)
    site.fake("squeue", 'echo "x" >>"$CALLS"; [[ $(wc -l <"$CALLS") -lt 4 ]] && echo "RUNNING|None"; exit 0')
    site.fake("sacct", "echo 'COMPLETED|0:0'")
    ticket = replace(make(site.folder)[0], native="17")
    with pytest.raises(JobError, match=r"\.log is not there: job .* is running"):
        list(Slurm().logs(ticket, False))
    log = site.folder / "the runs" / "small" / f"{ticket.job}.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    assert list(Slurm().logs(ticket, False)) == ["one\n"]
    pieces = Slurm().logs(ticket, True)
    assert next(pieces) == "one\n"
    with log.open("a") as file:
        file.write("two\n")
    assert "".join(pieces) == "two\n"


@pytest.mark.parametrize(("word", "asked"), [("RUNNING", "scancel --batch --signal=INT 17"), ("PENDING", "scancel 17")])
def test_a_stop_lets_the_driver_save(site: Site, monkeypatch: pytest.MonkeyPatch, word: str, asked: str) -> None:
    monkeypatch.setattr(backend, "FOLLOW_SECONDS", 0.01)
    site.fake("squeue", f'[[ -e "$CALLS" ]] || echo "{word}|None"')
    site.fake("sacct", "echo 'FAILED|76:0'")
    site.fake("scancel", 'echo "scancel $*" >>"$CALLS"')
    Slurm().stop(replace(make(site.folder)[0], native="17"))
    assert site.calls == [asked]


def test_a_job_that_does_not_end_is_cancelled(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(backend, "END_SECONDS", -9.9)
    site.fake("squeue", 'echo "RUNNING|None"')
    site.fake("scancel", 'echo "scancel $*" >>"$CALLS"')
    with pytest.raises(JobError, match=r"did not end within cluster.grace_seconds = 10"):
        Slurm().stop(replace(make(site.folder)[0], native="17"))
    assert site.calls == ["scancel --batch --signal=INT 17", "scancel 17"]
