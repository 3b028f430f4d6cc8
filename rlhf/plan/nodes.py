"""Which process stands on which node and GPU, as Ray packs a job's placement group, and whether it fits there."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.plan.cluster import Cluster, Node
from rlhf.plan.placement import CONTEXT_GIB, DRIVER_GIB, RAY_GIB, Sizes
from rlhf.plan.types import ActorPlan, NodePlan, Parts, Transport
from rlhf.recipe import Recipe

Bundle = dict[str, float]  # Ray's shares of one node: "CPU", and "GPU" where there are any


@dataclass(frozen=True)
class Seating:
    """The bundles of a placement group, in which of them each process of a role stands, and on which node each bundle
    does (None: on none has it room)."""

    actors: tuple[ActorPlan, ...]
    bundles: list[Bundle]
    places: dict[str, list[int]]
    nodes: list[int | None]


def seated(recipe: Recipe, cluster: Cluster, engines: int, scalars: int, tenants: int, sizes: Sizes) -> Seating:
    """The processes of the whole curriculum, `engines` engines and room for `scalars` reward models among them and
    `tenants` on each GPU. Their shares of cores are as large as all find room with: phases mostly alternate."""
    total = recipe.resources.trainer_ranks + engines + recipe.resources.reward_workers + scalars
    for share in _shares(cluster, total):
        actors = _actors(recipe, engines, scalars, tenants, sizes, share)
        bundles, places = reserved(actors, cluster.gpus if tenants > 1 else 0)
        nodes = packed(bundles, cluster.nodes)
        if None not in nodes:
            places = gathered(bundles, places, nodes)
            break
    return Seating(actors, bundles, places, nodes)


def _shares(cluster: Cluster, processes: int) -> list[float]:
    """Shares of a core to try, largest first; those of which a node holds a whole number."""
    parts = {
        min(1.0, math.floor(100 * node.cpus / number) / 100)
        for node in set(cluster.nodes)
        for number in range(1, processes + 1)
    }
    return sorted(parts - {0.0}, reverse=True) or [0.01]


def _actors(
    recipe: Recipe, engines: int, scalars: int, tenants: int, sizes: Sizes, share: float
) -> tuple[ActorPlan, ...]:
    r, cuda = recipe.resources, recipe.resources.device == "cuda"
    part = math.floor(100 / max(tenants, 1)) / 100 if cuda else 0.0
    host = {role: max(each, default=0.0) for role, each in sizes.hosts.items()}
    trainer, engine = (sum(size for _, size in parts) for parts in (sizes.trainer_parts, sizes.engine_parts))
    on_gpu = {"trainer": trainer, "rollout": engine, "scalar": sizes.scalar} if cuda else dict[str, float]()

    def actor(role: str, count: int, threads: int, gpus: float) -> ActorPlan:
        return ActorPlan(role, count, share, threads, gpus, host[role], on_gpu.get(role, 0.0))

    return (
        actor("trainer", r.trainer_ranks, r.trainer_threads, part),
        actor("rollout", engines, r.rollout_threads, part * r.tensor_parallel),
        actor("reward", r.reward_workers, 1, 0),
        # as many threads as the engine of a judge in its place would have
        *([actor("scalar", scalars, r.rollout_threads, part)] if scalars else []),
    )


def reserved(actors: Sequence[ActorPlan], shared_gpus: int) -> tuple[list[Bundle], dict[str, list[int]]]:
    """The bundles of these processes, and which of them each process of a role stands in: one of its own or, where
    trainer and engines share GPUs, that of a GPU. Processes go round the GPUs, so that no two trainer ranks meet on
    one."""
    shares: list[Bundle] = [{"CPU": 0.0, "GPU": 1.0} for _ in range(shared_gpus)]
    turns, places = itertools.cycle(range(shared_gpus)), dict[str, list[int]]()
    for actor in actors:
        found = places[actor.role] = []
        for _ in range(actor.count):
            if shared_gpus and actor.gpus:
                place = next(turns)
                shares[place]["CPU"] += actor.cpus
            else:
                place = len(shares)
                shares.append({"CPU": actor.cpus} | ({"GPU": actor.gpus} if actor.gpus else {}))
            found.append(place)
    return shares, places


def packed(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Node]) -> list[int | None]:
    """The node of each bundle by Ray's strategy PACK: the largest bundle takes the node it leaves emptiest, all others
    that have room there follow, and so on with the nodes that are left. A test compares with Ray itself."""
    found: list[int | None] = [None] * len(bundles)
    waiting = sorted(range(len(bundles)), key=lambda index: _size(bundles[index]), reverse=True)
    free = {index: {"CPU": float(node.cpus), "GPU": float(node.gpus)} for index, node in enumerate(nodes)}
    while waiting:
        able = [index for index in free if _fits(bundles[waiting[0]], free[index])]
        if not able:
            waiting.pop(0)
            continue
        node = max(able, key=lambda index: (_left(bundles[waiting[0]], free[index]), -index))
        room = free.pop(node)
        later = []
        for index in waiting:
            if _fits(bundles[index], room):
                found[index] = node
                for name, share in bundles[index].items():
                    room[name] -= share
            else:
                later.append(index)
        waiting = later
    return found


def gathered(bundles: Sequence[Bundle], places: Mapping[str, list[int]], where: Sequence[Any]) -> dict[str, list[int]]:
    """`places` with bundles that are alike dealt anew, of which Ray puts any anywhere: processes of a role stand on as
    few nodes as may be, beginning where most of these bundles are. `where`: the node of each bundle."""
    dealt: dict[int, int] = {}
    for kind in dict.fromkeys(tuple(sorted(bundle.items())) for bundle in bundles):
        alike = [index for index, bundle in enumerate(bundles) if tuple(sorted(bundle.items())) == kind]
        number = Counter(where[index] for index in alike)
        by_node = sorted(alike, key=lambda index: (-number[where[index]], str(where[index]), index))
        dealt |= dict(zip(alike, by_node, strict=True))
    return {role: [dealt[index] for index in found] for role, found in places.items()}


def _size(bundle: Mapping[str, float]) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle["CPU"]


def _fits(bundle: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(share <= room[name] + 1e-6 for name, share in bundle.items())


def _left(bundle: Mapping[str, float], room: Mapping[str, float]) -> float:
    """How much of what the bundle asks for stays free, in shares of what is."""
    return sum((room[name] - share) / room[name] for name, share in bundle.items() if share)


@dataclass(frozen=True)
class GpuNeed:
    """GiB needed of each GPU of a bundle, and the trainer ranks, reward models and awake engines that meet there."""

    gib: float
    ranks: int
    scalars: int
    engines: int
    parts: Parts  # of one that stands alone

    def __str__(self) -> str:
        words = [
            *(["a trainer rank"] if self.ranks else []),
            *([f"{self.scalars} reward model(s)"] if self.scalars else []),
            *([f"{self.engines} engine(s) awake"] if self.engines else []),
        ]
        if len(words) > 1 or self.engines > 1:
            return f"{' and '.join(filter(None, (', '.join(words[:-1]), words[-1])))} on one GPU"
        return "an engine" if self.engines else "a reward model" if self.scalars else words[0]


def gpu_needs(seating: Seating, awake: int, transport: Transport, sizes: Sizes) -> dict[int, GpuNeed]:
    """By bundle, where that has GPUs. `awake`: engines of a GPU that several processes hold that are awake at once; 0
    where nobody shares one."""
    met: dict[int, dict[str, list[int]]] = {}
    for role, places in seating.places.items():
        for number, bundle in enumerate(places):
            if seating.bundles[bundle].get("GPU"):
                met.setdefault(bundle, {}).setdefault(role, []).append(number)
    rank, engine = (sum(size for _, size in parts) for parts in (sizes.trainer_parts, sizes.engine_parts))
    found = {}
    for bundle, roles in sorted(met.items()):
        ranks, engines, scalars = (roles.get(role, []) for role in ("trainer", "rollout", "scalar"))
        standing = min(len(engines), awake) if awake else len(engines)
        # what goes by NCCL is a copy that the first rank alone has
        without = sum(number > 0 for number in ranks) * (sizes.copy if transport == "nccl" else 0.0)
        asleep = (len(engines) - standing) * CONTEXT_GIB
        gib = len(ranks) * rank - without + len(scalars) * sizes.scalar + standing * engine + asleep
        parts = sizes.trainer_parts if ranks else sizes.engine_parts if engines else ()
        alone = len(ranks) + len(scalars) + len(engines) == 1
        found[bundle] = GpuNeed(gib, len(ranks), len(scalars), standing, parts if alone and not without else ())
    return found


def node_plans(
    cluster: Cluster, seating: Seating, needs: Mapping[int, GpuNeed], transport: Transport, sizes: Sizes
) -> Iterator[NodePlan]:
    """What stands on each node that has a process, and what it needs there; the driver stands by the first rank."""
    chief = seating.nodes[seating.places["trainer"][0]]
    stand: dict[int, dict[str, list[int]]] = {}
    for role, places in seating.places.items():
        for number, bundle in enumerate(places):
            node = seating.nodes[bundle]
            assert node is not None
            stand.setdefault(node, {}).setdefault(role, []).append(number)
    gpus: dict[int, list[float]] = {}
    for bundle, need in needs.items():
        node = seating.nodes[bundle]
        assert node is not None
        gpus.setdefault(node, []).extend([need.gib] * round(seating.bundles[bundle]["GPU"]))
    for node, roles in sorted(stand.items()):
        host = RAY_GIB + sum(sizes.hosts[role][number] for role, numbers in roles.items() for number in numbers)
        host += DRIVER_GIB if node == chief else 0.0
        # every node that reads it from Ray's object store has a copy
        host += sizes.published if node == chief or (transport == "cpu" and "rollout" in roles) else 0.0
        counts = tuple((role, len(numbers)) for role, numbers in roles.items())
        yield NodePlan(cluster.nodes[node], counts, host, tuple(gpus.get(node, ())))


def too_large(
    recipe: Recipe, cluster: Cluster, seating: Seating, nodes: Sequence[NodePlan], needs: Mapping[int, GpuNeed]
) -> Iterator[str]:
    """Problems of fitting it into the memory there is."""
    limit, together = recipe.resources.memory_gib, sum(planned.memory_gib for planned in nodes)
    if together > limit:
        yield (
            f"the processes need about {together:.1f} GiB, more than resources.memory_gib = {limit:g}; raise it, or "
            "lower resources.kv_cache_gib, token_budget or the number of workers"
        )
    for planned, times in Counter(nodes).items():
        if planned.memory_gib > planned.node.memory_gib:
            stand = ", ".join(f"{count} {role}" for role, count in planned.processes)
            where = "this machine" if len(cluster.nodes) == 1 else f"a node with {stand} ({times} such)"
            yield (
                f"the processes need about {planned.memory_gib:.1f} GiB of host memory, and {where} has "
                f"{planned.node.memory_gib:.1f}"
            )
    told = set()
    for bundle, need in needs.items():
        node = cluster.nodes[seating.nodes[bundle] or 0]
        if node.gpu_memory_gib is not None and need.gib > node.gpu_memory_gib and str(need) not in told:
            told.add(str(need))
            of = ", ".join(f"{name} {size:.1f}" for name, size in need.parts if size >= 0.05)
            yield (
                f"{need} would need about {need.gib:.1f} GiB{f' ({of})' if of else ''}, and a GPU has "
                f"{node.gpu_memory_gib:.1f}"
            )


def homeless(cluster: Cluster, seating: Seating) -> Iterator[str]:
    """Problems of finding room for every process."""
    lost = [bundle for bundle, node in zip(seating.bundles, seating.nodes, strict=True) if node is None]
    if not lost:
        return
    largest = max(lost, key=_size)
    shares = ", ".join(f"{share:g} {name}" for name, share in largest.items() if share)
    yield (
        f"{len(lost)} of {len(seating.bundles)} bundles of processes find no room on {cluster}: one of {shares} has to "
        "be of one node; lower resources.tensor_parallel, rollout_workers or trainer_ranks"
    )
