"""Jobs of a Kubernetes cluster: a RayJob of KubeRay, queued and admitted whole by Kueue where `cluster.queue` is given.

Everything goes by kubectl, with the rights and the cluster of whoever calls it. Field names: KubeRay 1.7, ray.io/v1.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from actors.jobs.backend import JobError, State, UnknownJobError, machines_of
from actors.jobs.command import ANSWER_SECONDS, RefusedError, ask
from actors.jobs.shipment import Shipment, functions_of
from actors.jobs.ticket import Ticket
from rlhf.preemption import REQUEUE
from rlhf.recipe import ClusterTable, NodesTable, Recipe

INSTALL = "install kubectl, and give it the cluster's configuration (KUBECONFIG)"
NAME_LENGTH = 47  # of a RayJob: KubeRay makes the cluster's name of it, and services' of that
TEXT_BYTES = 1_000_000  # a ConfigMap holds 1 MiB with its keys
WORK, SCRIPTS = "/job/files", "/job/scripts"  # where the recipe's files are mounted in every pod, and our scripts
SHM = "/dev/shm"  # noqa: S108 - of a pod, where Ray's object store lies
NAME = re.compile("[a-z0-9]([-a-z0-9.]*[a-z0-9])?")  # of an object of Kubernetes
PID_FILE = "/tmp/rlhf-driver.pid"  # noqa: S108 - of a pod that has one driver
SHARED_MEMORY = 0.4  # of a pod's memory: Ray's object store takes three tenths of it
RETRIES = 3  # new clusters after a pod was lost; each continues from the last checkpoint
KEPT_SECONDS = 600  # that the pods of an ended job stay, for whoever looks
MOST_GROUPS = 5  # of workers: Kueue admits eight sets of pods, and a RayJob has up to three of another kind
POD_END_SECONDS = 30  # for Ray itself, after the driver
DEADLINE_SECONDS = 60.0  # for the API to forget a deleted job, beyond its pods' grace
ASK_SECONDS = 5.0  # between questions whether a job has begun
FOLDER = ".kuberay"  # under cluster.runs


class _Yaml(yaml.SafeDumper):
    """Text of several lines as a block, as it was written; what is there twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Yaml.add_representer(str, _text)


@dataclass(frozen=True)
class KubeRay:
    """The Kubernetes backend."""

    def render(self, ticket: Ticket, recipe: Recipe) -> str:
        return _as_text(_files(ticket, recipe), _ray_job(ticket, recipe))

    def submit(self, ticket: Ticket, recipe: Recipe) -> str:
        files, job = _files(ticket, recipe), _ray_job(ticket, recipe)
        _kubectl(ticket, "apply", "-f", "-", given=_as_text(files))
        try:
            _kubectl(ticket, "apply", "-f", "-", given=_as_text(job))
        except RefusedError as refused:
            if not refused.unanswered:  # else there may be a RayJob, which mounts them
                _withdraw_files(ticket, refused)
            raise
        return name_of(ticket.job)

    def state(self, ticket: Ticket) -> tuple[State, str]:
        try:
            found = _get(ticket, "rayjobs.ray.io", ticket.native)
        except RefusedError as refused:
            if "NotFound" not in refused.said:
                raise
            space = ticket.cluster.kuberay.namespace
            raise UnknownJobError(f"{space} has no RayJob {ticket.native}", State.STOPPED) from refused
        return _state(ticket, found)

    def logs(self, ticket: Ticket, follow: bool) -> Iterator[str]:
        state, why = self.state(ticket)
        while follow and state is State.WAITING:  # as long as it is queued, which whoever follows may end
            time.sleep(ASK_SECONDS)
            state, why = self.state(ticket)
        if state is State.WAITING:
            raise JobError(f"job {ticket.job!r} has printed nothing yet: it is waiting ({why})")
        # the submitter's pod prints what the driver does
        command = _command(ticket, "logs", f"job/{ticket.native}", "--tail=-1", *(["--follow"] if follow else []))
        if not follow:
            yield ask(*command, absent=INSTALL)
            return
        # ends with the job, whose own deadlines are the driver's and cluster.hours
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as printing:
            assert printing.stdout is not None
            try:
                yield from printing.stdout
            finally:
                printing.terminate()

    def stop(self, ticket: Ticket) -> None:
        seconds = _pod_grace(ticket.cluster) + DEADLINE_SECONDS
        # foreground: it is gone when its pods are, which end when the driver has saved
        options = ["--ignore-not-found", "--cascade=foreground", "--wait", f"--timeout={seconds:.0f}s"]
        _kubectl(ticket, "delete", "rayjobs.ray.io", ticket.native, *options, seconds=seconds + ANSWER_SECONDS)
        _delete_files(ticket, ticket.native)  # last: a job that is still there may be tried again, and mounts them


def name_of(job: str) -> str:
    """A job's name as a RayJob may have it: lower case, letters, digits and dashes, a letter first, none too long."""
    *recipe, day, time, digits = job.split("-")
    end = f"-{day}-{time}-{digits}"
    made = re.sub("[^a-z0-9]+", "-", "-".join(recipe).lower()).strip("-")
    made = made if made[:1].isalpha() else f"r-{made}"
    return made[: NAME_LENGTH - len(end)].rstrip("-") + end


def _as_text(*objects: dict[str, Any]) -> str:
    return yaml.dump_all(objects, Dumper=_Yaml, sort_keys=False, width=120, explicit_start=True)


def _withdraw_files(ticket: Ticket, refused: RefusedError) -> None:
    """Delete the ConfigMap of a RayJob that was refused. Raises JobError where it stays."""
    name = name_of(ticket.job)
    try:
        _delete_files(ticket, name)
    except JobError as error:
        raise JobError(f"{refused}\nits ConfigMap {name} is left, and to be deleted by hand: {error}") from refused


def _delete_files(ticket: Ticket, name: str) -> None:
    _kubectl(ticket, "delete", "configmaps", name, "--ignore-not-found")


def _command(ticket: Ticket, verb: str, *arguments: str) -> list[str]:
    return ["kubectl", verb, "--namespace", ticket.cluster.kuberay.namespace, *arguments]


def _kubectl(ticket: Ticket, *arguments: str, given: str | None = None, seconds: float = ANSWER_SECONDS) -> str:
    return ask(*_command(ticket, *arguments), absent=INSTALL, given=given, seconds=seconds)


def _get(ticket: Ticket, *what: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_kubectl(ticket, "get", *what, "--output=json"))
    return found


def _state(ticket: Ticket, job: Mapping[str, Any]) -> tuple[State, str]:
    """Of a RayJob as Kubernetes has it."""
    status = job.get("status", {})
    said, deployed = status.get("jobStatus", ""), status.get("jobDeploymentStatus", "")
    # Ray's message goes on with what the job printed last
    why = (status.get("message") or status.get("reason") or "").partition("\n")[0]
    if job["spec"].get("suspend") or deployed in ("Suspended", "Suspending"):
        return State.WAITING, _queued(ticket, job)
    if deployed in ("Complete", "Failed", "ValidationFailed"):
        failed = State.PREEMPTED if f"exit code {REQUEUE}" in why else State.FAILED
        return {"SUCCEEDED": State.SUCCEEDED, "STOPPED": State.STOPPED}.get(said, failed), why
    if deployed == "Running" and said not in ("", "PENDING"):
        return State.RUNNING, why
    cluster = status.get("rayClusterName")
    return State.WAITING, (cluster and _pods(ticket, cluster)) or why or f"{deployed or 'new'}: KubeRay has it"


def _queued(ticket: Ticket, job: Mapping[str, Any]) -> str:
    """What Kueue says of a job that it has not admitted, or has taken back."""
    if ticket.cluster.queue is None:
        return "suspended"
    selector = f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}"
    workloads = _get(ticket, "workloads.kueue.x-k8s.io", f"--selector={selector}")["items"]
    if not workloads:
        return f"queue {ticket.cluster.queue!r} has not seen it yet; is there such a LocalQueue, and does Kueue run?"
    conditions = {one["type"]: one for one in workloads[0].get("status", {}).get("conditions", [])}
    told = [
        conditions[kind]["message"]
        for kind, wanted in (("Evicted", "True"), ("QuotaReserved", "False"), ("Admitted", "False"))
        if conditions.get(kind, {}).get("status") == wanted
    ]
    return "; ".join(dict.fromkeys(told)) or f"in queue {ticket.cluster.queue!r}"


def _pods(ticket: Ticket, cluster: str) -> str:
    """Why the first pod of a cluster that does not run yet does not."""
    for pod in _get(ticket, "pods", f"--selector=ray.io/cluster={cluster}")["items"]:
        name, status = pod["metadata"]["name"], pod["status"]
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"pod {name}: {condition.get('message', condition.get('reason', 'not scheduled'))}"
        for container in status.get("containerStatuses", []):
            if waiting := container.get("state", {}).get("waiting"):
                return f"pod {name}: {waiting.get('message') or waiting.get('reason')}"
    return ""


def _files(ticket: Ticket, recipe: Recipe) -> dict[str, Any]:
    """The ConfigMap: the recipe's files as file-0, file-1 …, and the scripts that start and end a job."""
    shipment = Shipment.of(ticket, recipe)
    texts = dict(zip(_keys(shipment), shipment.texts.values(), strict=True))
    size = sum(len(text.encode()) for text in texts.values())
    if size > TEXT_BYTES:
        largest = max(shipment.texts, key=lambda name: len(shipment.texts[name]))
        raise JobError(
            f"the recipe's files have {size:,} bytes, and {TEXT_BYTES:,} can be shipped; the largest is {largest}: put "
            "what is large into the image, or on the volume"
        )
    arguments = ticket.arguments(shipment.recipe_files)
    scripts = {
        "run.sh": _script(ticket, arguments=arguments),
        "end-head.sh": END_HEAD.format(pid_file=PID_FILE, seconds=ticket.cluster.grace_seconds),
        "end-worker.sh": END_WORKER.format(
            running=shlex.quote(_beside(ticket, "running")), seconds=_grace(ticket.cluster)
        ),
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(ticket, {}),
        "data": {**scripts, **texts},
    }


def _keys(shipment: Shipment) -> list[str]:
    return [f"file-{number}" for number in range(len(shipment.texts))]


END_HEAD = """\
# Before the head's pod ends: the driver is told, and has time to save a checkpoint.
set -euo pipefail
[[ -s {pid_file} ]] || exit 0
kill -TERM "$(<{pid_file})" 2>/dev/null || exit 0
while [[ -e {pid_file} ]] && ((SECONDS < {seconds})); do sleep 1; done
"""
END_WORKER = """\
# Before a worker's pod ends: the driver needs its actors to save a checkpoint.
set -euo pipefail
while [[ -e {running} ]] && ((SECONDS < {seconds})); do sleep 1; done
"""


def _script(ticket: Ticket, arguments: list[str]) -> str:
    """What the driver starts with."""
    here = Path(__file__)
    variables = {
        "running": _beside(ticket, "running"),
        "ended": _beside(ticket, "ended"),
        "pid_file": PID_FILE,
        "work": WORK,
    }
    assigned = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
    return (
        f"#!/bin/bash\nset -euo pipefail\n\n{assigned}arguments=({shlex.join(arguments)})\n\n"
        f"{here.with_name('attend.sh').read_text()}\n{here.with_name('kuberay.sh').read_text()}"
    )


def _beside(ticket: Ticket, what: str) -> str:
    """A file of this job on the shared volume: `running` is there while the driver is, `ended` says with what."""
    return f"{ticket.runs}/{FOLDER}/{name_of(ticket.job)}.{what}"


def _grace(cluster: ClusterTable) -> int:
    """Seconds that a pod's preStop may wait for the driver."""
    return cluster.grace_seconds + POD_END_SECONDS


def _pod_grace(cluster: ClusterTable) -> int:
    """Seconds that a pod may take to end: the driver's, and Ray's."""
    return _grace(cluster) + POD_END_SECONDS


def _metadata(ticket: Ticket, labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": name_of(ticket.job),
        "namespace": ticket.cluster.kuberay.namespace,
        "labels": {"app.kubernetes.io/name": "thinkfusion", **labels},
        "annotations": {"thinkfusion/job": ticket.job},
    }


def _ray_job(ticket: Ticket, recipe: Recipe) -> dict[str, Any]:
    cluster = ticket.cluster
    _require(ticket)
    labels = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue is not None else {}
    if cluster.priority is not None:
        labels["kueue.x-k8s.io/priority-class"] = cluster.priority
    head, *others = cluster.nodes
    workers = [(head, head.count - 1), *((nodes, nodes.count) for nodes in others)]
    files = list(zip(_keys(shipment := Shipment.of(ticket, recipe)), shipment.texts, strict=True))
    spec: dict[str, Any] = {
        # admitted by Kueue, all pods or none
        "suspend": cluster.queue is not None,
        # one word for each: the shells of the submitter and of Ray both split it
        "entrypoint": f"bash {SCRIPTS}/run.sh",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "backoffLimit": RETRIES,
        **({} if cluster.hours is None else {"activeDeadlineSeconds": math.ceil(cluster.hours * 3600)}),
        "submitterPodTemplate": _submitter(cluster),
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {"dashboard-host": "0.0.0.0"},  # noqa: S104 - of the pod, behind the token
                "template": _pod(ticket, recipe, head, files, "head"),
            },
            "workerGroupSpecs": [
                {
                    "groupName": f"nodes-{number}",
                    "replicas": count,
                    "minReplicas": count,
                    "maxReplicas": count,
                    "rayStartParams": {},
                    "template": _pod(ticket, recipe, nodes, files, "worker"),
                }
                for number, (nodes, count) in enumerate(workers)
                if count
            ],
        },
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(ticket, labels), "spec": spec}


def _require(ticket: Ticket) -> None:
    """Raise JobError for what a RayJob needs of [cluster] and is not given."""
    cluster, kinds = ticket.cluster, machines_of(ticket)
    _require_names(cluster)
    if cluster.kuberay.claim is None:
        raise JobError(
            "cluster.kuberay.claim is not given: checkpoints must outlive pods; name a PersistentVolumeClaim that all "
            "pods can mount (ReadWriteMany)"
        )
    if cluster.runs is None or not Path(cluster.runs).is_absolute():
        raise JobError('cluster.runs must be the path at which the claim is mounted in every pod, such as "/runs"')
    if cluster.runs == "/" or any(Path(cluster.runs).is_relative_to(own) for own in (WORK, SCRIPTS, SHM)):
        raise JobError(
            f'cluster.runs = "{cluster.runs}": pods have files of their own there; give a path such as "/runs"'
        )
    if cluster.hours is not None and cluster.hours * 3600 <= cluster.grace_seconds:
        raise JobError(
            f"cluster.hours = {cluster.hours:g} is no longer than cluster.grace_seconds = {cluster.grace_seconds}, in "
            "which a checkpoint is saved; raise the one, or lower the other"
        )
    if cluster.priority is not None and cluster.queue is None:
        raise JobError(f"cluster.priority = {cluster.priority!r} is Kueue's: give cluster.queue, or remove it")
    if len(kinds) > MOST_GROUPS:
        raise JobError(f"[[cluster.nodes]] has {len(kinds)} kinds of machine, and {MOST_GROUPS} can be queued")


def _require_names(cluster: ClusterTable) -> None:
    """Raise JobError for what no object of Kubernetes can be called."""
    kube = cluster.kuberay
    named = {
        "queue": cluster.queue,
        "priority": cluster.priority,
        "kuberay.namespace": kube.namespace,
        "kuberay.claim": kube.claim,
        "kuberay.service_account": kube.service_account,
        **{f"kuberay.secrets.{number}": secret for number, secret in enumerate(kube.secrets)},
    }
    for key, name in named.items():
        if name is not None and not NAME.fullmatch(name):
            raise JobError(
                f"cluster.{key} = {name!r}: a name of Kubernetes has lower-case letters, digits, dashes and dots, and "
                "begins and ends with a letter or digit; give the object's name"
            )


def _submitter(cluster: ClusterTable) -> dict[str, Any]:
    """The pod that hands the job to Ray and prints what it prints."""
    container = {
        "name": "ray-job-submitter",
        "image": cluster.kuberay.image,
        "resources": _resources({"cpu": "500m", "memory": "1Gi"}),
        "securityContext": _container_security(),
    }
    return {"spec": {"restartPolicy": "Never", "securityContext": _pod_security(), "containers": [container]}}


def _pod(ticket: Ticket, recipe: Recipe, nodes: NodesTable, files: list[tuple[str, str]], role: str) -> dict[str, Any]:
    """A machine of the job."""
    cluster, kube, name = ticket.cluster, ticket.cluster.kuberay, name_of(ticket.job)
    memory = _mebibytes(nodes.memory_gib)
    resources = {"cpu": str(nodes.cpus), "memory": memory}
    if nodes.gpus:
        resources["nvidia.com/gpu"] = str(nodes.gpus)
    environment = {
        "PYTHONPATH": WORK,
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(cluster.grace_seconds),
    }
    mounts = {"runs": ticket.runs, "files": WORK, "scripts": SCRIPTS, "shared-memory": SHM}
    sandboxed = _runs_programs(recipe)
    container = {
        "name": f"ray-{role}",
        "image": kube.image,
        "workingDir": WORK,  # Ray's processes begin where the recipe's paths are seen from
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        **({"envFrom": [{"secretRef": {"name": secret}} for secret in kube.secrets]} if kube.secrets else {}),
        "resources": _resources(resources),
        "securityContext": _container_security(sandboxed),
        "volumeMounts": [
            {"name": volume, "mountPath": path, **({"readOnly": True} if volume in ("files", "scripts") else {})}
            for volume, path in mounts.items()
        ],
        "lifecycle": {"preStop": {"exec": {"command": ["bash", f"{SCRIPTS}/end-{role}.sh"]}}},
    }
    scripts = ("run.sh", "end-head.sh", "end-worker.sh")
    tolerations = [one.model_dump(exclude_none=True) for one in kube.tolerations]
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _pod_grace(cluster),
        "automountServiceAccountToken": kube.service_account is not None,
        **({} if kube.service_account is None else {"serviceAccountName": kube.service_account}),
        **({"nodeSelector": kube.node_selector} if kube.node_selector else {}),
        **({"tolerations": tolerations} if tolerations else {}),
        "securityContext": _pod_security(sandboxed),
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": kube.claim}},
            {"name": "files", "configMap": {"name": name, "items": [{"key": key, "path": to} for key, to in files]}},
            {"name": "scripts", "configMap": {"name": name, "items": [{"key": key, "path": key} for key in scripts]}},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": _mebibytes(nodes.memory_gib * SHARED_MEMORY)},
            },
        ],
    }
    return {"metadata": {"labels": {"app.kubernetes.io/name": "thinkfusion"}}, "spec": spec}


def _mebibytes(gib: float) -> str:
    return f"{math.floor(gib * 1024)}Mi"


def _resources(amounts: dict[str, str]) -> dict[str, dict[str, str]]:
    """What is asked for is what there is: a pod of guaranteed quality is the last to be evicted."""
    return {"requests": amounts, "limits": dict(amounts)}


def _pod_security(sandboxed: bool = False) -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "seccompProfile": {"type": "Unconfined" if sandboxed else "RuntimeDefault"},
    }


def _container_security(sandboxed: bool = False) -> dict[str, Any]:
    """sandboxed: programs that a model wrote run in namespaces of their own, which the defaults forbid to make."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        **({"appArmorProfile": {"type": "Unconfined"}} if sandboxed else {}),
    }


def _runs_programs(recipe: Recipe) -> bool:
    """Whether a reward of the recipe runs what the model wrote."""
    return any(function.startswith("rewards.code:") for _, function in functions_of(recipe))
