"""Jobs of a Kubernetes cluster: manifests against the published schemas, pods' scripts, and a kubectl that only writes
down how it was called."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from actors import jobs
from actors.jobs import JobError, State, Ticket
from actors.jobs.kuberay import KubeRay, name_of
from actors.jobs.ticket import keep, names
from rlhf.plan.feasibility import problems
from rlhf.recipe import Recipe, load
from tests.unit.toy_recipe import ONLY

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).with_name("schemas")
SITE = ROOT / "recipes" / "sites" / "kuberay.toml"
KUBERNETES = "1.33"
RECIPE = f"""
name = "Small_one"
model.path = "some/model"
[data.rows]
builder = "digits"
table = "text"
{ONLY}"""
REWARDED = """
[[stages]]
name = "practice"
kind = "rl"
data = {rows = 1}
steps = 1
prompts_per_step = 1
"""
CLUSTER: dict[str, Any] = {
    "to": "kuberay",
    "nodes": [{"count": 3, "cpus": 8, "memory_gib": 32, "gpus": 2}],
    "runs": "/runs",
    "queue": "team",
    "priority": "high",
    "hours": 2,
    "grace_seconds": 60,
    "kuberay": {"claim": "runs", "secrets": ["wandb"], "namespace": "research"},
}


@dataclass
class Desk:
    """A folder where the user stands."""

    folder: Path

    def make(self, more: str = "", **cluster: Any) -> tuple[Ticket, Recipe]:
        (self.folder / "small.toml").write_text(RECIPE + more)
        recipe = load(["small.toml"])
        made = type(recipe.cluster).model_validate({**CLUSTER, **cluster})
        recipe = recipe.model_copy(update={"cluster": made})
        return Ticket.of(recipe, ["small.toml"], ["seed = 1"], self.folder / "runs"), recipe

    def render(self, more: str = "", **cluster: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The ConfigMap and the RayJob."""
        files, job = yaml.safe_load_all(KubeRay().render(*self.make(more, **cluster)))
        return files, job


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path)


def assert_valid(files: dict[str, Any], job: dict[str, Any]) -> None:
    kubernetes_validate.validate(files, KUBERNETES, strict=True)
    schema = json.loads((SCHEMAS / "rayjob-v1.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(job)
    for template in pods_of(job):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def pods_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The submitter's template, the head's, the workers'."""
    cluster = job["spec"]["rayClusterSpec"]
    workers = [group["template"] for group in cluster["workerGroupSpecs"]]
    return [job["spec"]["submitterPodTemplate"], cluster["headGroupSpec"]["template"], *workers]


def test_manifests_are_what_the_schemas_allow(desk: Desk) -> None:
    assert_valid(*desk.render())
    plain = {"queue": None, "priority": None, "hours": None, "nodes": [{"cpus": 2, "memory_gib": 4}]}
    assert_valid(*desk.render(**plain))
    kube = {"claim": "c", "service_account": "trainer", "node_selector": {"disk": "fast"}}
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    files, job = desk.render(kuberay={**kube, "tolerations": tolerations})
    assert_valid(files, job)
    assert pods_of(job)[1]["spec"]["tolerations"] == tolerations
    several = [CLUSTER["nodes"][0], {"count": 2, "cpus": 64, "memory_gib": 99.5}]
    assert_valid(*desk.render(nodes=several))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda job: job["spec"].update(supsend=True),
        lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"),
        lambda job: job["spec"]["rayClusterSpec"].pop("rayVersion"),
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
        lambda job: job["spec"].update(submissionMode="SomeMode"),
        lambda job: job["metadata"].update(name="x" * 48),
        lambda job: pods_of(job)[1]["spec"]["containers"][0].update(evnFrom=[]),
        lambda job: pods_of(job)[2]["spec"].update(restartPolicy=1),
    ],
)
def test_the_schemas_see_what_is_wrong(desk: Desk, wrong: Callable[[dict[str, Any]], object]) -> None:
    files, job = desk.render()
    wrong(job)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        assert_valid(files, job)


def test_the_site_file_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load(["recipes/think_fusion_digits.toml", SITE])
    ticket = Ticket.of(recipe, ["recipes/think_fusion_digits.toml"], [], tmp_path)
    files, job = yaml.safe_load_all(KubeRay().render(ticket, recipe))
    assert_valid(files, job)
    recipe_file = ROOT / "recipes" / "think_fusion_digits.toml"  # what it names of ours is in the image
    assert shipped(files, job) == {"recipes/think_fusion_digits.toml": recipe_file.read_text()}


def test_a_job_is_queued_whole(desk: Desk) -> None:
    _, job = desk.render()
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert job["metadata"]["namespace"] == "research"
    assert job["spec"]["suspend"] is True
    assert job["spec"]["activeDeadlineSeconds"] == 7200
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)  # the head is one of the three
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    _, unqueued = desk.render(queue=None, priority=None)
    assert unqueued["spec"]["suspend"] is False


def test_a_pod_has_what_its_machine_has(desk: Desk) -> None:
    _, job = desk.render()
    submitter, *nodes = pods_of(job)
    for pod in nodes:
        (container,) = pod["spec"]["containers"]
        wanted = {"cpu": "8", "memory": "32768Mi", "nvidia.com/gpu": "2"}
        assert container["resources"] == {"requests": wanted, "limits": wanted}
        assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["runs"] == "/runs"
        assert mounts["shared-memory"] == "/dev/shm"
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "runs"
        assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "13107Mi"}
        assert pod["spec"]["terminationGracePeriodSeconds"] > 60
    for pod in (submitter, *nodes):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_only_programs_that_a_model_wrote_loosen_a_pod(desk: Desk) -> None:
    _, job = desk.render()
    assert {pod["spec"]["securityContext"]["seccompProfile"]["type"] for pod in pods_of(job)} == {"RuntimeDefault"}
    more = REWARDED + '[stages.rewards.runs]\nfunction = "rewards.code:prints"\n'
    files, job = desk.render(more)
    assert_valid(files, job)
    submitter, head, worker = pods_of(job)
    assert submitter["spec"]["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for pod in (head, worker):
        assert pod["spec"]["securityContext"]["seccompProfile"]["type"] == "Unconfined"
        assert pod["spec"]["containers"][0]["securityContext"]["appArmorProfile"] == {"type": "Unconfined"}


def shipped(files: dict[str, Any], job: dict[str, Any]) -> dict[str, str]:
    """What lies where, seen from where the job stands."""
    (volume,) = (volume for volume in pods_of(job)[1]["spec"]["volumes"] if volume["name"] == "files")
    return {item["path"]: files["data"][item["key"]] for item in volume["configMap"]["items"]}


def test_the_recipes_files_go_along(desk: Desk) -> None:
    (desk.folder / "mine").mkdir()
    (desk.folder / "mine" / "short.py").write_text("from beside import limit\n\ndef short(item): return limit\n")
    (desk.folder / "mine" / "beside.py").write_text("limit = 1.0\n")
    (desk.folder / "strict.txt").write_text("{question} {reply}")
    more = '[judges.strict]\nendpoint = "http://a/v1"\nmodel = "m"\ntemplate = "strict.txt"\n'
    more += REWARDED + '[stages.rewards.short]\nfunction = "mine/short.py:short"\n'
    more += '[stages.rewards.right]\nfunction = "rewards.answer:boxed"\n'
    found = shipped(*desk.render(more))
    assert set(found) == {"small.toml", "mine/short.py", "mine/beside.py", "strict.txt"}  # ours are in the image
    assert found["small.toml"] == RECIPE + more


def test_a_module_of_the_users_goes_along_with_its_package(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    package = desk.folder / "team_rewards_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "brief.py").write_text("def brief(item): return 1.0\n")
    monkeypatch.syspath_prepend(desk.folder)
    more = REWARDED + '[stages.rewards.brief]\nfunction = "team_rewards_of_a_test.brief:brief"\n'
    found = shipped(*desk.render(more))
    assert {f"{package.name}/__init__.py", f"{package.name}/brief.py"} < set(found)


def test_a_recipe_file_from_elsewhere_gets_a_name_here(
    desk: Desk, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "size.toml"
    elsewhere.write_text("seed = 3\n")
    ticket, recipe = desk.make()
    ticket = replace(ticket, files=("small.toml", str(elsewhere)))
    files, job = yaml.safe_load_all(KubeRay().render(ticket, recipe))
    assert shipped(files, job)["1-size.toml"] == "seed = 3\n"
    assert "arguments=(small.toml 1-size.toml -o 'seed = 1'" in files["data"]["run.sh"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            '[data.own]\npath = "rows.jsonl"\n',
            "data.own.path = 'rows.jsonl': data and models are not shipped.*below /runs",
        ),
        ('[data.own]\npath = "/data/rows"\n', "data.own.path = '/data/rows': data and models"),
        (REWARDED + 'record = "kept"\nrewards = {}\n', "stages.practice.record = 'kept'"),
        (
            REWARDED + '[stages.rewards.far]\nfunction = "../far.py:far"\n',
            "stages.practice.rewards.far.function = '../far.py' is not named from",
        ),
        (
            REWARDED + '[stages.rewards.gone]\nfunction = "gone.py:gone"\n',
            "stages.practice.rewards.gone.function: .*gone.py cannot be read",
        ),
    ],
)
def test_what_cannot_be_shipped_is_refused(desk: Desk, more: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        desk.render(more)


def test_what_lies_on_the_volume_needs_no_shipping(desk: Desk) -> None:
    assert set(shipped(*desk.render('[data.own]\npath = "/runs/data/rows.jsonl"\n'))) == {"small.toml"}


def test_rows_on_a_volume_that_is_not_mounted_here_are_the_jobs_to_look_at(desk: Desk, tmp_path: Path) -> None:
    more = f'[data.own]\npath = "{tmp_path}/volume/rows.jsonl"\n'
    _, recipe = desk.make(more, runs=str(tmp_path / "volume"))
    assert not [problem for problem in problems(recipe) if "data.own" in problem and "no such file" in problem]
    (tmp_path / "volume").mkdir()
    assert [problem for problem in problems(recipe) if "data.own" in problem and "no such file" in problem]


def test_a_recipe_too_large_is_refused(desk: Desk) -> None:
    with pytest.raises(JobError, match=r"1,000,000 can be shipped; the largest is small.toml"):
        desk.render("# " + "x" * 1_000_000)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"nodes": []}, "cluster.nodes.. is not given"),
        ({"kuberay": {}}, "cluster.kuberay.claim is not given: checkpoints must outlive pods"),
        ({"runs": None}, "cluster.runs must be the path at which the claim is mounted"),
        ({"queue": None}, "cluster.priority = 'high' is Kueue's: give cluster.queue"),
        ({"nodes": CLUSTER["nodes"] * 6}, "6 kinds of machine, and 5 can be queued"),
        ({"hours": 0.01}, "cluster.hours = 0.01 is no longer than cluster.grace_seconds = 60"),
        ({"runs": "/job/files"}, 'cluster.runs = "/job/files": pods have files of their own there'),
        ({"runs": "/dev/shm/runs"}, "pods have files of their own there"),
        ({"runs": "/"}, "pods have files of their own there"),
        ({"queue": "Team A!"}, "cluster.queue = 'Team A!': a name of Kubernetes has lower-case letters"),
        ({"kuberay": {"claim": "runs", "namespace": "My NS"}}, "cluster.kuberay.namespace = 'My NS': a name"),
        ({"kuberay": {"claim": "runs", "secrets": ["ok", "-"]}}, "cluster.kuberay.secrets.1 = '-': a name"),
    ],
)
def test_what_a_rayjob_lacks_is_told(desk: Desk, cluster: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        desk.render(**cluster)


@pytest.mark.parametrize("recipe", ["digits", "Think_Fusion.v2", "7b", "a" * 90, "-", "a-b-c"])
def test_names_are_those_of_kubernetes(recipe: str) -> None:
    name = name_of(f"{recipe}-20261129-101112-0a1b")
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47
    assert name.endswith("-20261129-101112-0a1b")


# --- the scripts of a pod


def scripts(desk: Desk, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The scripts as files, for pods whose folders are under tmp_path; and an environment with an rlhf that stays until
    it is told."""
    files, _ = desk.render(runs=str(tmp_path / "runs"), grace_seconds=10)
    place = tmp_path / "scripts"
    place.mkdir()
    for name in ("run.sh", "end-head.sh", "end-worker.sh"):
        text = files["data"][name].replace("/tmp/rlhf-driver.pid", str(tmp_path / "driver.pid"))
        (place / name).write_text(text.replace("/job/files", str(desk.folder)))
    fake = tmp_path / "bin" / "rlhf"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/bin/bash\ntrap 'echo told; kill $!; exit 75' TERM\necho \"$*\" >{tmp_path}/called\n"
        "sleep ${DRIVER_SECONDS-0} &\ntouch ready\nwait $!\nexit 3\n"
    )
    fake.chmod(0o755)
    return place, {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}


@pytest.mark.parametrize("name", ["run.sh", "end-head.sh", "end-worker.sh"])
def test_shellcheck_finds_nothing(desk: Desk, tmp_path: Path, name: str) -> None:
    place, _ = scripts(desk, tmp_path)
    linter = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([linter, "--shell=bash", place / name], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


def test_a_driver_ends_as_it_ends(desk: Desk, tmp_path: Path) -> None:
    place, environment = scripts(desk, tmp_path)
    done = subprocess.run(["bash", place / "run.sh"], env=environment, timeout=30, check=False)
    assert done.returncode == 3
    called = (tmp_path / "called").read_text()
    assert called.startswith("run small.toml -o seed = 1 -o [cluster]")
    assert called.rstrip().endswith(f"--runs {tmp_path}/runs --address auto")
    assert not list((tmp_path / "runs").rglob("*.running"))
    assert (tmp_path / "runs" / ".kuberay").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75, 137])
def test_a_driver_that_would_fail_again_is_not_tried_again(desk: Desk, tmp_path: Path, status: int) -> None:
    place, environment = scripts(desk, tmp_path)
    (tmp_path / "bin" / "rlhf").write_text(f"#!/bin/bash\necho >>{tmp_path}/tries\nexit {status}\n")
    for _ in range(2):
        tried = subprocess.run(["bash", place / "run.sh"], env=environment, timeout=30, check=False)
        assert tried.returncode == status
    assert len((tmp_path / "tries").read_text().splitlines()) == (1 if status in (2, 3) else 2)


def test_pods_wait_for_the_checkpoint(desk: Desk, tmp_path: Path) -> None:
    place, environment = scripts(desk, tmp_path)
    with subprocess.Popen(["bash", place / "run.sh"], env=environment | {"DRIVER_SECONDS": "60"}) as driver:
        deadline = time.monotonic() + 30
        while not (desk.folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with subprocess.Popen(["bash", place / "end-worker.sh"]) as worker:
            time.sleep(0.3)
            assert worker.poll() is None  # the driver has not saved yet
            subprocess.run(["bash", place / "end-head.sh"], timeout=30, check=True)
            assert driver.wait(timeout=30) == 75
            assert worker.wait(timeout=30) == 0
    assert subprocess.run(["bash", place / "end-head.sh"], timeout=30, check=False).returncode == 0


def test_a_driver_that_ray_stops_too_is_told_twice_and_ends_once(desk: Desk, tmp_path: Path) -> None:
    place, environment = scripts(desk, tmp_path)
    with subprocess.Popen(
        ["bash", place / "run.sh"], env=environment | {"DRIVER_SECONDS": "60"}, start_new_session=True
    ) as driver:
        deadline = time.monotonic() + 30
        while not (desk.folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGTERM)  # the shell, and all under it
        assert driver.wait(timeout=30) == 75


def test_no_signal_costs_the_drivers_status(desk: Desk, tmp_path: Path) -> None:
    place, environment = scripts(desk, tmp_path)
    (tmp_path / "bin" / "rlhf").write_text(
        f"#!{sys.executable}\nimport os, pathlib, signal, time\n"
        "told = []\nsignal.signal(signal.SIGTERM, lambda *_: told.append(1))\n"
        "pathlib.Path('ready').touch()\nend = time.monotonic() + 30\n"
        "while not told and time.monotonic() < end: time.sleep(0.01)\ntime.sleep(0.05)\nos._exit(7)\n"
    )
    for _ in range(10):  # an interrupted `wait` loses the status of one in five
        with subprocess.Popen(["bash", place / "run.sh"], env=environment, start_new_session=True) as driver:
            deadline = time.monotonic() + 30
            while not (desk.folder / "ready").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            while driver.poll() is None:
                assert time.monotonic() < deadline
                os.kill(driver.pid, signal.SIGTERM)
                time.sleep(0.005)
        assert driver.returncode == 7
        (desk.folder / "ready").unlink()


# --- kubectl


@dataclass
class Kubectl:
    """A kubectl that answers from files, and what it was called with."""

    folder: Path

    def answers(self, **kinds: Any) -> None:
        for kind, value in kinds.items():
            (self.folder / f"{kind}.json").write_text(json.dumps(value))

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    folder = tmp_path / "cluster"
    folder.mkdir()
    fake = folder / "kubectl"
    fake.write_text(
        f"""#!/bin/bash
echo "$*" >>{folder}/calls
case $1 in
  apply)
    tee {folder}/given >>{folder}/applied
    [[ ! -e {folder}/refuse ]] || ! grep -q 'kind: RayJob' {folder}/given || {{ cat {folder}/refuse >&2; exit 1; }} ;;
  get) cat "{folder}/${{4%%.*}}.json" 2>/dev/null || {{ echo 'Error from server (NotFound)' >&2; exit 1; }} ;;
  delete) [[ $(cat {folder}/stuck 2>/dev/null) != "$4" ]] || {{ echo 'error: timed out waiting' >&2; exit 1; }} ;;
  logs) printf 'one\\ntwo\\n' ;;
esac
"""
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return Kubectl(folder)


def test_a_job_is_applied(desk: Desk, kubectl: Kubectl) -> None:
    ticket, recipe = desk.make()
    native = KubeRay().submit(ticket, recipe)
    assert native == name_of(ticket.job)
    assert kubectl.calls == ["apply --namespace research -f -"] * 2  # the files first
    assert (kubectl.folder / "applied").read_text() == KubeRay().render(ticket, recipe)


def test_a_cluster_without_kuberay_is_quoted(desk: Desk, kubectl: Kubectl) -> None:
    (kubectl.folder / "refuse").write_text('no matches for kind "RayJob" in version "ray.io/v1"')
    ticket, recipe = desk.make()
    with pytest.raises(JobError, match=r'^kubectl apply ended with status 1: no matches for kind "RayJob"'):
        KubeRay().submit(ticket, recipe)
    name = name_of(ticket.job)
    assert kubectl.calls[2:] == [f"delete --namespace research configmaps {name} --ignore-not-found"]
    (kubectl.folder / "stuck").write_text("configmaps")
    with pytest.raises(JobError, match=f"(?s)no matches.*its ConfigMap {name} is left.*timed out waiting"):
        KubeRay().submit(ticket, recipe)


@pytest.mark.parametrize(
    "said",
    [
        "Error from server: etcdserver: request timed out",
        "error: context deadline exceeded",
        "Post ...: read tcp 10.0.0.1:4->10.0.0.2:443: read: connection reset by peer",
        "http2: client connection lost",
    ],
)
def test_a_job_that_was_perhaps_applied_keeps_its_files(desk: Desk, kubectl: Kubectl, said: str) -> None:
    (kubectl.folder / "refuse").write_text(said)
    ticket, recipe = desk.make()
    with pytest.raises(JobError, match=f"job '{ticket.job}' was perhaps handed over"):
        jobs.submit(ticket, recipe, desk.folder)
    assert names(desk.folder) == [ticket.job]
    assert len(kubectl.calls) == 2  # nothing was deleted


def test_where_there_is_no_kubectl(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(desk.folder))
    with pytest.raises(JobError, match=r"there is no kubectl here: install kubectl.*KUBECONFIG"):
        KubeRay().submit(*desk.make())


def told(suspend: bool = False, **status: Any) -> dict[str, Any]:
    return {"metadata": {"uid": "u-1"}, "spec": {"suspend": suspend}, "status": status}


EXIT = "Job entrypoint command failed with exit code {}, last available logs:\nmany\nlines"


@pytest.mark.parametrize(
    ("job", "state", "why"),
    [
        (told(jobStatus="RUNNING", jobDeploymentStatus="Running"), State.RUNNING, ""),
        (told(jobStatus="FAILED", jobDeploymentStatus="Running"), State.RUNNING, ""),  # it may be tried again
        (told(jobDeploymentStatus="Retrying"), State.WAITING, "Retrying: KubeRay has it"),
        (told(), State.WAITING, "new: KubeRay has it"),
        (told(jobStatus="SUCCEEDED", jobDeploymentStatus="Complete"), State.SUCCEEDED, ""),
        (told(jobStatus="STOPPED", jobDeploymentStatus="Complete"), State.STOPPED, ""),
        (
            told(jobStatus="FAILED", jobDeploymentStatus="Failed", message=EXIT.format(3), reason="AppFailed"),
            State.FAILED,
            "Job entrypoint command failed with exit code 3, last available logs:",
        ),
        (
            told(jobStatus="FAILED", jobDeploymentStatus="Failed", message=EXIT.format(75)),
            State.PREEMPTED,
            "Job entrypoint command failed with exit code 75, last available logs:",
        ),
        (told(jobDeploymentStatus="Failed", reason="DeadlineExceeded"), State.FAILED, "DeadlineExceeded"),
        (told(jobDeploymentStatus="ValidationFailed", message="a wrong name"), State.FAILED, "a wrong name"),
    ],
)
def test_states(desk: Desk, kubectl: Kubectl, job: dict[str, Any], state: State, why: str) -> None:
    kubectl.answers(rayjobs=job)
    ticket = replace(desk.make()[0], native="small-one")
    assert KubeRay().state(ticket) == (state, why)
    assert kubectl.calls[0] == "get --namespace research rayjobs.ray.io small-one --output=json"


def test_a_job_in_the_queue_says_what_it_waits_for(desk: Desk, kubectl: Kubectl) -> None:
    ticket = replace(desk.make()[0], native="small-one")
    lacking = "couldn't assign flavors to pod set head: insufficient unused quota for nvidia.com/gpu, 2 more needed"
    conditions = [{"type": "QuotaReserved", "status": "False", "message": lacking}]
    kubectl.answers(rayjobs=told(True), workloads={"items": [{"status": {"conditions": conditions}}]})
    assert KubeRay().state(ticket) == (State.WAITING, lacking)
    assert kubectl.calls[1].endswith("workloads.kueue.x-k8s.io --selector=kueue.x-k8s.io/job-uid=u-1 --output=json")
    gone = {"type": "Evicted", "status": "True", "message": "Preempted to accommodate a workload of higher priority"}
    kubectl.answers(workloads={"items": [{"status": {"conditions": [*conditions, gone]}}]})
    assert KubeRay().state(ticket) == (State.WAITING, f"{gone['message']}; {lacking}")
    kubectl.answers(workloads={"items": []})
    assert "is there such a LocalQueue" in KubeRay().state(ticket)[1]


def test_a_pod_that_does_not_start_says_why(desk: Desk, kubectl: Kubectl) -> None:
    ticket = replace(desk.make()[0], native="small-one")
    kubectl.answers(rayjobs=told(jobDeploymentStatus="Initializing", rayClusterName="small-one-x"))
    unfit = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu."}
    kubectl.answers(pods={"items": [{"metadata": {"name": "head"}, "status": {"conditions": [unfit]}}]})
    assert KubeRay().state(ticket) == (State.WAITING, "pod head: 0/3 nodes are available: 3 Insufficient cpu.")
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff"}}}
    kubectl.answers(pods={"items": [{"metadata": {"name": "head"}, "status": {"containerStatuses": [waiting]}}]})
    assert KubeRay().state(ticket) == (State.WAITING, "pod head: ImagePullBackOff")


def test_a_job_that_was_deleted_was_stopped(desk: Desk, kubectl: Kubectl) -> None:
    ticket = replace(desk.make()[0], native="small-one")
    keep(ticket, desk.folder)
    found = jobs.status(ticket.job, desk.folder)
    assert found.state is State.STOPPED
    assert found.why == f"research has no RayJob small-one; `rlhf resubmit {ticket.job}` continues it"


def test_a_job_that_kubernetes_does_not_have_yet_has_not_ended(desk: Desk, kubectl: Kubectl) -> None:
    ticket, recipe = desk.make()
    keep(ticket, desk.folder)
    with pytest.raises(JobError, match=r"being submitted, or was never handed over \(research has no RayJob small-"):
        jobs.status(ticket.job, desk.folder)
    with pytest.raises(JobError, match="two cannot share its run folder"):
        jobs.submit(ticket.again(), recipe, desk.folder)


def test_logs_are_the_submitters(desk: Desk, kubectl: Kubectl) -> None:
    ticket = replace(desk.make()[0], native="small-one")
    kubectl.answers(rayjobs=told(jobStatus="RUNNING", jobDeploymentStatus="Running"))
    assert "".join(KubeRay().logs(ticket, False)) == "one\ntwo\n"
    assert kubectl.calls[-1] == "logs --namespace research job/small-one --tail=-1"
    assert "".join(KubeRay().logs(ticket, True)) == "one\ntwo\n"
    assert kubectl.calls[-1] == "logs --namespace research job/small-one --tail=-1 --follow"
    kubectl.answers(rayjobs=told(jobDeploymentStatus="Retrying"))
    with pytest.raises(JobError, match="has printed nothing yet: it is waiting"):
        list(KubeRay().logs(ticket, False))


def test_a_job_that_waits_is_followed_once_it_runs(
    desk: Desk, kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubectl.answers(rayjobs=told(jobDeploymentStatus="Retrying"))

    def begin(seconds: float) -> None:
        kubectl.answers(rayjobs=told(jobStatus="RUNNING", jobDeploymentStatus="Running"))

    monkeypatch.setattr(time, "sleep", begin)
    assert "".join(KubeRay().logs(replace(desk.make()[0], native="small-one"), True)) == "one\ntwo\n"


def test_a_stop_waits_for_the_pods(desk: Desk, kubectl: Kubectl) -> None:
    KubeRay().stop(replace(desk.make()[0], native="small-one"))
    options = "--ignore-not-found --cascade=foreground --wait --timeout=180s"  # a pod may take 120 s
    both = [
        f"delete --namespace research rayjobs.ray.io small-one {options}",
        "delete --namespace research configmaps small-one --ignore-not-found",
    ]
    assert kubectl.calls == both
    (kubectl.folder / "calls").unlink()
    (kubectl.folder / "stuck").write_text("rayjobs.ray.io")
    with pytest.raises(JobError, match=r"^kubectl delete ended with status 1: error: timed out waiting"):
        KubeRay().stop(replace(desk.make()[0], native="small-one"))
    assert kubectl.calls == both[:1]  # what is still there may mount its files again
