"""What docker/ has for clusters: the compose file and the queue, against the published schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from actors.jobs import Ticket
from actors.jobs.kuberay import KubeRay
from rlhf.recipe import load

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SCHEMAS = Path(__file__).with_name("schemas")
UNITS = {"m": 0.001, "": 1, "Mi": 2**20, "Gi": 2**30}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return read


@pytest.fixture(scope="module")
def queue() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCKER / "kueue.yaml").read_text()))


def lint(path: Path) -> str:
    """What the compose specification's schema finds wrong in a file."""
    linter = Path(sys.executable).with_name("check-jsonschema")
    command = [linter, "--builtin-schema", "vendor.compose-spec", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_the_compose_file_is_one(compose: dict[str, Any], tmp_path: Path) -> None:
    assert lint(DOCKER / "compose.yaml") == ""
    compose = json.loads(json.dumps(compose))
    compose["services"]["head"]["shm-size"] = compose["services"]["head"].pop("shm_size")
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(compose))
    assert "shm-size" in lint(tmp_path / "compose.yaml")


def test_a_head_and_two_workers_behind_a_token(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["worker"]["deploy"]["replicas"] == 2
    assert services["head"]["ports"] == ["127.0.0.1:8265:8265"]  # this machine alone
    assert not services["worker"].get("ports")
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/token"
        assert service["secrets"] == ["token"]
        assert service["shm_size"]
        assert service["volumes"] == ["runs:/runs"]
    for name in ("head", "worker"):
        assert services[name]["healthcheck"]["test"][:3] == ["CMD", "ray", "health-check"]
    assert "docker/token" in (ROOT / ".gitignore").read_text().splitlines()
    assert "docker/token" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_job_runs_what_the_image_has(compose: dict[str, Any]) -> None:
    command = compose["services"]["job"]["command"]
    (recipe,) = (word for word in command if word.endswith(".toml"))
    assert (ROOT / Path(recipe).relative_to("/thinkfusion")).is_file()
    for name in ("Dockerfile.cpu", "Dockerfile.gpu"):  # a volume takes over who owns the folder it is mounted on
        assert "install --directory --owner=rlhf /runs" in (DOCKER / name).read_text()


def test_the_queue_is_one(queue: list[dict[str, Any]]) -> None:
    schema = jsonschema.Draft202012Validator(json.loads((SCHEMAS / "kueue-v1beta2.json").read_text()))
    for one in queue:
        if one["apiVersion"].startswith("kueue"):
            schema.validate(one)
        else:
            kubernetes_validate.validate(one, "1.33", strict=True)
    (clusters,) = (one for one in queue if one["kind"] == "ClusterQueue")
    clusters["spec"]["preemtion"] = {}
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(clusters)
    del clusters["spec"]["preemtion"]


def quantity(text: str | int) -> float:
    number = str(text).rstrip("MGim")
    return float(number) * UNITS[str(text)[len(number) :]]


def test_the_example_job_fits_the_example_queue(
    queue: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load(["recipes/think_fusion_digits.toml", "recipes/sites/kuberay.toml"])
    ticket = Ticket.of(recipe, ["recipes/think_fusion_digits.toml"], [], tmp_path)
    _, job = yaml.safe_load_all(KubeRay().render(ticket, recipe))
    named = {(one["kind"], one["metadata"]["name"]) for one in queue}
    labels = job["metadata"]["labels"]
    assert ("LocalQueue", labels["kueue.x-k8s.io/queue-name"]) in named
    assert ("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"]) in named
    assert ("PersistentVolumeClaim", recipe.cluster.kuberay.claim) in named
    ray = job["spec"]["rayClusterSpec"]
    pods = [(job["spec"]["submitterPodTemplate"], 1), (ray["headGroupSpec"]["template"], 1)]
    pods += [(group["template"], group["replicas"]) for group in ray["workerGroupSpecs"]]
    asked = dict.fromkeys(("cpu", "memory", "nvidia.com/gpu"), 0.0)
    for pod, count in pods:
        for name, amount in pod["spec"]["containers"][0]["resources"]["requests"].items():
            asked[name] += count * quantity(amount)
    (clusters,) = (one for one in queue if one["kind"] == "ClusterQueue")
    (group,) = clusters["spec"]["resourceGroups"]
    assert list(asked) == group["coveredResources"]
    for resource in group["flavors"][0]["resources"]:
        assert asked[resource["name"]] <= quantity(resource["nominalQuota"])
        assert 2 * asked[resource["name"]] > quantity(resource["nominalQuota"])  # a second one waits
