"""A Ray cluster of simulated nodes whose interpreter lacks our package, with token authentication: what is sent to it
suffices, a job there ends as it does here, and jobs that do not fit wait for each other.

The user's folder has a reward by path and one by module, a builder of rows, and a `rewards` package of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from actors import jobs
from actors.jobs.ticket import Ticket
from actors.nodes import port as free_port
from rlhf.recipe import load

pytestmark = [pytest.mark.timeout(3300), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
DEADLINE = 1500.0  # of the run here, and of all jobs there, on a machine much slower than the usual
DIGITS = [ROOT / "recipes" / "think_fusion_digits.toml", ROOT / "recipes" / "sizes" / "smoke.toml"]
OTHERS = [stage.name for stage in load(DIGITS).stages if stage.name not in ("language", "rl-verifiable")]
SHORT = """
name = "short"
data.questions = {builder = "plugged.rows:build"}
[stages.language]
steps = 2
evaluate = "none"
[stages.rl-verifiable]
start = "language"
data = {questions = 1.0}
steps = 2
prompts_per_step = 4
group_size = 4
max_tokens = 12
checkpoint_every = 10
evaluate = "none"
rewards.format = {remove = true}
rewards.answer = {function = "own/letters.py:variety", weight = 0.5}
rewards.length = {function = "plugged.lengths:short", weight = 0.5}
""" + "".join(f"[stages.{name}]\nremove = true\n" for name in OTHERS)
TINY = ["stages.rl-verifiable.remove = true"]
PLUGGED = {
    "own/letters.py": "from own.counting import kinds\ndef variety(item):\n    return kinds(item.token_ids) / 12\n",
    "own/counting.py": "def kinds(ids):\n    return len(set(ids))\n",
    "plugged/__init__.py": "",
    "plugged/lengths.py": "def short(item):\n    return 1.0 / item.num_tokens\n",
    "plugged/rows.py": "from rlhf.data.digits import build\n",
    "rewards/__init__.py": "raise ImportError('the user\\'s own')\n",
}


@dataclass(frozen=True)
class Site:
    """A running cluster, and where run folders lie."""

    address: str
    runs: Path

    def ticket(self, name: str, *overrides: str) -> Ticket:
        overrides = (f'name = "{name}"', *overrides)
        site = f'cluster.ray.address = "{self.address}"'
        return Ticket.of(load(files(), [*overrides, site]), files(), overrides, self.runs)

    def submit(self, name: str, *overrides: str) -> str:
        ticket = self.ticket(name, *overrides)
        recipe = load(ticket.files, [*ticket.overrides]).model_copy(update={"cluster": ticket.cluster})
        return jobs.submit(ticket, recipe, self.runs).job


def files() -> list[str]:
    return [*(str(ROOT / "recipes" / name) for name in ("think_fusion_digits.toml", "sizes/smoke.toml")), "short.toml"]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's folder, where they stand."""
    folder = tmp_path_factory.mktemp("site") / "user"
    for name, text in {**PLUGGED, "short.toml": SHORT}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))  # a plan looks at plug-ins where it is made
        yield folder


@pytest.fixture(scope="module")
def here(user: Path) -> Path:
    """The run folder of the same recipe, run here."""
    runs = user.parent / "here"
    command = [sys.executable, "-P", "-m", "rlhf.cli", "run", *files(), "--runs", str(runs)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{user}", "WANDB_MODE": "offline"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return runs / "short"


@pytest.fixture(scope="module")
def site(user: Path) -> Iterator[Site]:
    (token := user.parent / "token").write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch, running(user.parent, token) as address:
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        yield Site(address, user.parent / "runs")


class running:  # noqa: N801 - a context
    """A cluster whose nodes run on an interpreter without our package; yields its address."""

    def __init__(self, root: Path, token: Path) -> None:
        venv.create(root / "node")
        (packages,) = (root / "node" / "lib").glob("python*/site-packages")
        # .pth files in there are not read: an editable install is not seen
        (packages / "vendors.pth").write_text(str(Path(psutil.__file__).parents[1]))
        self.python = root / "node" / "bin" / "python"
        keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_AUTH_TOKEN")}
        self.environment = keep | {
            "PATH": f"{self.python.parent}:{keep['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "WANDB_MODE": "offline",
        }
        self.port = free_port()

    def __enter__(self) -> str:
        found = subprocess.run(
            [self.python, "-c", "import rlhf"], env=self.environment, cwd="/", capture_output=True, timeout=60
        )
        assert b"No module named 'rlhf'" in found.stderr, "the nodes' interpreter must lack our package"
        command = [self.python, ROOT / "tests" / "e2e" / "cluster.py", self.port, 1, 1, 1]
        self.process = subprocess.Popen(
            [*map(str, command)],
            env=self.environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __exit__(self, *error: object) -> None:
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)
        _, left = psutil.wait_procs(family, timeout=60)
        for process in left:
            process.kill()
        assert not left


def until(job: str, runs: Path, seen: Callable[[jobs.Found], bool], deadline: float) -> jobs.Found:
    while not seen(found := jobs.status(job, runs)):
        assert time.monotonic() < deadline, f"{found}\n{''.join(jobs.logs(job, runs))[-3000:]}"
        assert not found.ended, f"{found}\n{''.join(jobs.logs(job, runs))[-3000:]}"
        time.sleep(0.5)
    return found


def results(folder: Path) -> dict[str, Any]:
    """What a run found and made: metrics of its stages, but for how long things took, and digests of artifacts."""
    found = dict[str, Any]()
    for stage in json.loads((folder / "summary.json").read_text())["stages"]:
        metrics = {k: v for k, v in stage["metrics"].items() if "scoring_lag" not in k and "seconds" not in k}
        found |= {f"{stage['name']}.{key}": value for key, value in metrics.items()}
        found[f"{stage['name']} made"] = stage["artifact"]["digest"]
    return found


def test_jobs_run_there_as_here_one_after_the_other(here: Path, site: Site) -> None:
    deadline = time.monotonic() + DEADLINE
    first = site.submit("short")
    until(first, site.runs, lambda found: (site.runs / "short/stages/01-language/inputs.json").exists(), deadline)
    two = ["resources.trainer_ranks = 2", "resources.trainer_threads = 1"]  # who meet over nodes
    others = [site.submit("second", *TINY), site.submit("third", *TINY, *two)]
    for job, needed in zip(others, (2, 3), strict=True):
        waiting = until(
            job, site.runs, lambda found: found.state is jobs.State.WAITING and "free" in found.why, deadline
        )
        assert waiting.why == f"it needs {needed} × 1 CPU; 0 of 3 CPU are free"
    unwanted = site.submit("unwanted", *TINY)
    until(unwanted, site.runs, lambda found: found.state is jobs.State.WAITING and "free" in found.why, deadline)
    assert jobs.stop(unwanted, site.runs).state is jobs.State.STOPPED
    for job in (first, *others):
        done = until(job, site.runs, lambda found: found.ended, deadline)
        assert done.state is jobs.State.SUCCEEDED, done
    there, expected = results(site.runs / "short"), results(here)
    assert there.keys() == expected.keys()
    assert {key: (value, expected[key]) for key, value in there.items() if value != expected[key]} == {}
    ended = {found.job: found.state for found in jobs.list_jobs(site.runs)}
    assert ended == {**dict.fromkeys((first, *others), jobs.State.SUCCEEDED), unwanted: jobs.State.STOPPED}
    printed = "".join(jobs.logs(others[0], site.runs))
    assert "waiting for the cluster" in printed
    ids = {(site.runs / name / "wandb_id").read_text() for name in ("short", "second", "third")}
    assert len(ids) == 3


def test_a_client_without_the_token_is_refused(site: Site) -> None:
    assert requests.get(f"{site.address}/api/jobs/", timeout=10).status_code == 401
