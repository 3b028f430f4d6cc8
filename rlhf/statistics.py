"""What an RL stage adds up over its steps; small enough to lie in every checkpoint, so a resume loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.roles import SyncReport
from rlhf.types import StepStats

# |Δ log-prob| histogram: 20 bins a decade from 1e-9 to 10, so a quantile is known to 12 %
EDGES = np.logspace(-9, 1, 201)
# of float32; a larger difference is a top-k flip of a router near a tie, or a fault
LARGE = 1e-4
# what an optimizer step has one of; other metrics are means over its tokens
ONCE = ("loss", "router_aux", "grad_norm", "critic.loss", "critic.grad_norm")


@dataclass
class Totals:
    """Means of step metrics, the distribution of trainer − engine log-prob gaps, and the worst sync."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # of the steps that had it
    gap_counts: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    gap_above: int = 0
    gap_max: float = 0.0
    gap_flips: int = 0
    gap_tied: int = 0
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float], stats: StepStats, sync: SyncReport) -> None:
        """One step: its metrics, what the trainer saw of its sampled tokens, and its publish."""
        self.steps += 1
        for name, value in metrics.items():
            if name.endswith("_max"):
                self.maxima[f"rl.{name}"] = max(self.maxima.get(f"rl.{name}", value), value)
            else:
                self._sum(name, value)
        gaps = np.abs(np.asarray(stats.gap, dtype=np.float64))
        if len(gaps):
            counts = np.bincount(np.searchsorted(EDGES, gaps), minlength=len(EDGES) + 1)
            self.gap_counts = [old + int(new) for old, new in zip(self.gap_counts, counts, strict=True)]
            self.gap_above += int((gaps > LARGE).sum())
            tied = np.asarray(stats.tied)
            self.gap_flips += int(((gaps > LARGE) & tied).sum())
            self.gap_tied += int(tied.sum())
            self.gap_max = max(self.gap_max, float(gaps.max()))
        for name, value in (("sync", sync.seconds), ("proof", sync.proof_seconds)):
            self._sum(f"{name}_seconds", value)
        for name, value in {"sync.seconds.max": sync.seconds, **sync.metrics}.items():
            self.maxima[name] = max(self.maxima.get(name, value), value)

    def metrics(self) -> dict[str, float]:
        """Names as in summary.json: means rl.*, the distribution logprob_gap.*; maxima rl.*_max, sync*."""
        found = {f"rl.{name}": value / self.counts[name] for name, value in self.sums.items()}
        total = sum(self.gap_counts)
        if total:
            found |= {
                "logprob_gap.p999": self._quantile(0.999),
                "logprob_gap.median": self._quantile(0.5),
                "logprob_gap.max": self.gap_max,
                "logprob_gap.share_above_1e-4": self.gap_above / total,
                "logprob_gap.flips": float(self.gap_flips),
                # flips say little where nearly every token is at a tie
                "logprob_gap.share_tied": self.gap_tied / total,
                "logprob_gap.tokens": float(total),
            }
        return found | self.maxima

    def _sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def restore(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def _quantile(self, level: float) -> float:
        """The upper edge of the bin that holds the quantile."""
        rank = np.searchsorted(np.cumsum(self.gap_counts), level * sum(self.gap_counts))
        return float(EDGES[min(int(rank), len(EDGES) - 1)])


def merged(stats: Sequence[StepStats]) -> StepStats:
    """The updates of one step as one: means over their tokens (over the updates for what is one number of each), the
    maximum of *_max, the last learning rate, all tokens; and the gap of the first, whose rows were sampled by the
    weights it met. Nothing of no updates."""
    if not stats:
        return StepStats({})
    metrics = {}
    for name in dict.fromkeys(name for part in stats for name in part.metrics):
        found = [part.metrics for part in stats if name in part.metrics]
        values = np.array([part[name] for part in found])
        weights = np.array([1.0 if name in ONCE else part.get("tokens", 1.0) for part in found])
        if name.endswith("_max"):
            metrics[name] = float(values.max())
        elif name in ("lr", "tokens"):
            metrics[name] = float(values[-1] if name == "lr" else values.sum())
        else:
            metrics[name] = float((values * weights).sum() / max(weights.sum(), 1.0))
    return StepStats(metrics, stats[0].gap, stats[0].tied)


def gap_metrics(gap: Sequence[float]) -> dict[str, float]:
    """The 99.9th percentile of one batch's |trainer − engine| log-prob differences."""
    return {"logprob_gap.p999": float(np.quantile(np.abs(gap), 0.999))} if len(gap) else {}
