"""Which process stands on which node and GPU, as Ray packs a job's placement group, and whether it fits there."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
    host = {role: max(sizes, default=0.0) for role, sizes in sizes.hosts.items()}
    trainer, engine, scalar = (sizes_gib if cuda else 0.0 for sizes_gib in _on_gpu(sizes))
    return (
        ActorPlan("trainer", r.trainer_ranks, share, r.trainer_threads, part, host["trainer"], trainer),
        ActorPlan("rollout", engines, share, r.rollout_threads, part * r.tensor_parallel, host["rollout"], engine),
        ActorPlan("reward", r.reward_workers, share, 1, 0, host["reward"]),
        # as many threads as the engine of a judge in its place would have
        *([ActorPlan("scalar", scalars, share, r.rollout_threads, part, host["scalar"], scalar)] if scalars else []),
    )


def _on_gpu(sizes: Sizes) -> tuple[float, float, float]:
    return _sum(sizes.trainer_parts), _sum(sizes.engine_parts), sizes.scalar


def _sum(parts: Parts) -> float:
    return sum(size for _, size in parts)


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


def packed(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> list[int | None]:
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


def _size(bundle: Bundle) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle["CPU"]


def _fits(bundle: Bundle, room: Mapping[str, float]) -> bool:
    return all(share <= room[name] + 1e-6 for name, share in bundle.items())


def _left(bundle: Bundle, room: Mapping[str, float]) -> float:
    """How much of what the bundle asks for stays free, in shares of what is."""
    return sum((room[name] - share) / room[name] for name, share in bundle.items() if share)


def gpu_needs(
    seating: Seating, awake: int, transport: Transport, sizes: Sizes
) -> dict[int, tuple[float, tuple[int, int, int]]]:
    """Bundle with GPUs → GiB needed of each of them, and how many trainer ranks, reward models and awake engines meet
    there. `awake`: engines of a GPU that several processes hold that are awake at once; 0 where nobody shares one."""
    rank, engine, scalar = _on_gpu(sizes)
    found = {}
    for bundle, shares in enumerate(seating.bundles):
        ranks, engines, scalars = (
            [number for number, place in enumerate(seating.places.get(role, ())) if place == bundle]
            for role in ("trainer", "rollout", "scalar")
        )
        if not shares.get("GPU") or not (ranks or engines or scalars):
            continue
        standing = min(len(engines), awake) if awake else len(engines)
        # what goes by NCCL is a copy that the first rank alone has
        without = sum(number > 0 for number in ranks) * (sizes.copy if transport == "nccl" else 0.0)
        asleep = (len(engines) - standing) * CONTEXT_GIB
        needed = len(ranks) * rank - without + len(scalars) * scalar + standing * engine + asleep
        found[bundle] = needed, (len(ranks), len(scalars), standing)
    return found


def node_plans(
    cluster: Cluster,
    seating: Seating,
    needs: Mapping[int, tuple[float, tuple[int, int, int]]],
    transport: Transport,
    sizes: Sizes,
) -> Iterator[NodePlan]:
    """What stands on each node that has a process, and what it needs there; the driver stands by the first rank."""
    chief = seating.nodes[seating.places["trainer"][0]]
    for index, node in enumerate(cluster.nodes):
        here = {
            role: [number for number, bundle in enumerate(places) if seating.nodes[bundle] == index]
            for role, places in seating.places.items()
        }
        if not any(here.values()):
            continue
        host = RAY_GIB + sum(sizes.hosts[role][number] for role, numbers in here.items() for number in numbers)
        host += DRIVER_GIB if index == chief else 0.0
        # every node that reads it from Ray's object store has a copy
        reads = index == chief or (transport == "cpu" and bool(here["rollout"]))
        host += sizes.published if reads else 0.0
        gpus = [
            need
            for bundle, (need, _) in needs.items()
            if seating.nodes[bundle] == index
            for _ in range(round(seating.bundles[bundle]["GPU"]))
        ]
        yield NodePlan(node, tuple((role, len(found)) for role, found in here.items() if found), host, tuple(gpus))


def too_large(
    recipe: Recipe,
    cluster: Cluster,
    nodes: Sequence[NodePlan],
    needs: Mapping[int, tuple[float, tuple[int, int, int]]],
    sizes: Sizes,
) -> Iterator[str]:
    """Problems of fitting it into the memory there is."""
    r, together = recipe.resources, sum(planned.memory_gib for planned in nodes)
    if together > r.memory_gib:
        yield (
            f"the processes need about {together:.1f} GiB, more than resources.memory_gib = {r.memory_gib:g}; raise "
            "it, or lower resources.kv_cache_gib, token_budget or the number of workers"
        )
    for planned, times in Counter(nodes).items():
        if planned.memory_gib > planned.node.memory_gib:
            stand = ", ".join(f"{count} {role}" for role, count in planned.processes)
            where = "this machine" if len(cluster.nodes) == 1 else f"a node with {stand} ({times} such)"
            yield (
                f"the processes need about {planned.memory_gib:.1f} GiB of host memory, and {where} has "
                f"{planned.node.memory_gib:.1f}"
            )
    if r.device == "cpu":
        return
    yield from _beyond("a trainer rank", _sum(sizes.trainer_parts), cluster, sizes.trainer_parts)
    yield from _beyond("an engine", _sum(sizes.engine_parts), cluster, sizes.engine_parts)
    yield from _beyond("a reward model", sizes.scalar, cluster)
    needed, meeting = max(needs.values())
    if sum(meeting) > 1:
        yield from _beyond(f"{_in_words(*meeting)} on one GPU", needed, cluster)


def _in_words(ranks: int, scalars: int, engines: int) -> str:
    words = [
        *(["a trainer rank"] if ranks else []),
        *([f"{scalars} reward model(s)"] if scalars else []),
        *([f"{engines} engine(s) awake"] if engines else []),
    ]
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _beyond(who: str, needed: float, cluster: Cluster, parts: Parts = ()) -> Iterator[str]:
    limit = cluster.gpu_memory_gib
    if limit is not None and needed > limit:
        told = ", ".join(f"{name} {size:.1f}" for name, size in parts if size >= 0.05)
        yield f"{who} would need about {needed:.1f} GiB{f' ({told})' if told else ''}, and a GPU has {limit:.1f}"


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
