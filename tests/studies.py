"""What the papers of recipes/bridges report, in miniature: runs recipes/studies.toml for some seeds, each continued
where it stood, and writes what came of it beside what was reported.

python -m tests.studies [--seeds 0 1 2] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "studies.toml"
DEADLINE = 5400.0  # seconds of one seed


@dataclass(frozen=True)
class Study:
    """What a paper reports of arms that differ in one thing.

    arms      stages of the recipe, those reported to be better first
    measure   a metric of them, or their "seconds"
    lower     less is better
    slack     by how much an arm may be worse than the next and still be as good, for reports that two are alike
    """

    system: str
    asks: str
    reported: str
    arms: tuple[str, ...]
    measure: str = "eval.exact"
    lower: bool = False
    slack: float = 0.0

    @property
    def of(self) -> str:
        """What the measure is, in words."""
        kind = self.measure.removeprefix("eval.exact").lstrip(".")
        if self.measure.startswith("eval.exact"):
            return f"right answers{f' ({kind})' if kind else ''}"
        return {"model.trainable": "weights trained", "seconds": "seconds"}[self.measure]


LAVIN = ("lavin-adapters", "lavin-full")
STUDIES = (
    Study(
        "CogVLM",
        "a frozen decoder: experts for pictures in every layer, or a connector alone?",
        "experts",
        ("cogvlm-expert", "cogvlm-none"),
    ),
    Study("LaVIN", "adapters and connector, or everything?", "as good", LAVIN, slack=0.02),
    Study("LaVIN", "what is to be stored", "0.1 % of it", LAVIN, "model.trainable", lower=True),
    Study("LaVIN", "how long it takes", "71 % less", LAVIN, "seconds", lower=True),
    Study("LLaVA-NeXT", "half of the rows, as many steps", "98 % kept", ("next-half", "next-all"), slack=0.02),
    Study("LLaVA-NeXT", "three tenths of the rows", "stable", ("next-third", "next-all"), slack=0.02),
    Study("SVIT", "300 rows that name most, or any 300?", "those that name most", ("svit-core", "svit-random")),
    Study(
        "MoE-LLaVA",
        "experts after the dense model has learned, or at once, with as many steps?",
        "after",
        ("moe-three", "moe-direct"),
    ),
    Study(
        "MoE-LLaVA",
        "four experts of which a token takes one, or the dense layer it comes from?",
        "experts",
        ("moe-one", "moe-none"),
    ),
    Study(
        "LLaVA-1.5",
        "short answers: is the form asked for in the question, or not?",
        "asked for",
        ("llava15-asked-tuned", "llava15-unasked-tuned"),
        "eval.exact.short",
    ),
    Study(
        "LLaVA-1.5",
        "short answers asked for: the decoder tuned, or frozen?",
        "tuned",
        ("llava15-asked-tuned", "llava15-asked-frozen"),
        "eval.exact.short",
    ),
    Study(
        "LLaVAR",
        "questions about print: learned from print too, or not?",
        "from print",
        ("llavar-print", "llavar-none"),
    ),
)


@dataclass(frozen=True)
class Found:
    """A study's values, arms by seeds; verdict: "agrees" where every seed has the reported order, "disagrees" where
    none has it, else "open"."""

    study: Study
    values: dict[str, tuple[float, ...]]

    @property
    def verdict(self) -> str:
        sign = -1 if self.study.lower else 1
        held = [
            all(sign * (one - other) + self.study.slack > 0 for one, other in pairwise(line))
            for line in zip(*(self.values[arm] for arm in self.study.arms), strict=True)
        ]
        return "agrees" if all(held) else "open" if any(held) else "disagrees"


def find(study: Study, runs: Sequence[dict[str, Any]]) -> Found:
    """The study's values in the summaries of runs, one a seed. Raises KeyError for a stage or metric they lack."""
    lines = [
        {stage["name"]: stage["metrics"] | {"seconds": stage["seconds"]} for stage in run["stages"]} for run in runs
    ]
    return Found(study, {arm: tuple(line[arm][study.measure] for line in lines) for arm in study.arms})


def table(found: Sequence[Found]) -> str:
    """Markdown: a line for each study, every arm's mean over seeds and half its range."""
    lines = ["| system | question | measure | reported | here | |", "|---|---|---|---|---|---|"]
    for each in found:
        study = each.study
        arms = "<br>".join(f"{arm} {spread(values)}" for arm, values in each.values.items())
        lines.append(f"| {study.system} | {study.asks} | {study.of} | {study.reported} | {arms} | {each.verdict} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and half the range over seeds."""
    mean, half = statistics.mean(values), (max(values) - min(values)) / 2
    return f"{mean:,.0f} ± {half:,.0f}" if mean > 5 else f"{mean:.3f} ± {half:.3f}"


def run(seed: int, folder: Path) -> dict[str, Any]:
    """The summary of a seed's run, which is begun, continued or only looked at. Raises RuntimeError where it fails."""
    name = f"studies-seed-{seed}"
    overrides = [f"seed = {seed}", f"name = '{name}'", "tracking.wandb = false"]
    command = [sys.executable, "-m", "rlhf.cli", "run", str(RECIPE)]
    done = subprocess.run(
        [*command, *(part for override in overrides for part in ("-o", override))], cwd=folder, timeout=DEADLINE
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed with status {done.returncode}; the same command continues it")
    return dict(json.loads((folder / "runs" / name / "summary.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.studies", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where runs/ lies (default: here)")
    parser.add_argument("--json", type=Path, default=Path("studies.json"))
    parsed = parser.parse_args()
    try:
        runs = [run(seed, parsed.folder) for seed in parsed.seeds]
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"studies: {error}", file=sys.stderr)
        return 1
    found = [find(study, runs) for study in STUDIES]
    parsed.json.write_text(json.dumps([asdict(each) | {"verdict": each.verdict} for each in found], indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
