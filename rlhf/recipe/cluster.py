"""Where a job runs, and what is there: [cluster], in a recipe or in a site's own file that is laid over one.

    rlhf plan   recipe.toml --cluster site.toml
    rlhf submit recipe.toml --cluster site.toml

Nothing here changes what a stage learns, so a run may move from one cluster to another and continue.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf.recipe.table import NonEmpty, Positive, Table, UserPath


class NodesTable(Table):
    """`count` alike machines, as a job may use each: cores, GiB of memory, GPUs, GiB of one GPU."""

    count: PositiveInt = 1
    cpus: PositiveInt
    memory_gib: Positive
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_memory_gib: Positive | None = None


class RayTable(Table):
    """A Ray head that runs already. `address`: http://HOST:PORT of its dashboard (none: one is started here); `pip`:
    packages that its nodes lack; `env`: environment variables of the job."""

    address: str | None = None
    pip: list[str] = []
    env: dict[str, str] = {}


class Toleration(Table):
    """A taint of nodes that pods accept, in the words of Kubernetes."""

    key: NonEmpty | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None  # noqa: N815


class KubeRayTable(Table):
    """A Kubernetes cluster with KubeRay. `image`: built of docker/; `claim`: the volume claim that all pods share and
    run folders lie in, at `cluster.runs`; `secrets`: names whose keys become environment variables; `node_selector` and
    `tolerations`: of its pods."""

    image: NonEmpty = "thinkfusion:cpu"
    namespace: NonEmpty = "default"
    claim: NonEmpty | None = None
    service_account: NonEmpty | None = None
    secrets: list[NonEmpty] = []
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []


class SlurmTable(Table):
    """A Slurm cluster. `setup`: lines of shell that each node runs first (modules, an environment); `options`: more of
    sbatch's, such as { constraint = "h100" }."""

    account: NonEmpty | None = None
    setup: list[str] = []
    options: dict[str, str] = {}


class ClusterTable(Table):
    """`to`: where `rlhf submit` sends a job; `nodes`: the machines of one job; `queue`: Kueue's LocalQueue or Slurm's
    partition; `priority`: Kueue's WorkloadPriorityClass or Slurm's QOS; `hours`: the most a job may take each time
    that it starts; `grace_seconds`: between the notice that a job has to go and its end; `runs`: where run folders lie
    there, seen by all nodes under this path."""

    to: Literal["ray", "kuberay", "slurm"] = "ray"
    nodes: list[NodesTable] = []
    queue: NonEmpty | None = None
    priority: NonEmpty | None = None
    hours: Positive | None = None
    grace_seconds: Annotated[int, Field(ge=10)] = 120
    runs: UserPath | None = None
    ray: RayTable = RayTable()
    kuberay: KubeRayTable = KubeRayTable()
    slurm: SlurmTable = SlurmTable()
