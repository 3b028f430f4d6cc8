"""What the papers of recipes/bridges report, in miniature: runs recipes/studies.toml for some seeds, each continued
where it stood, and writes what came of it beside what was reported.

python -m tests.studies [--seeds 0 1 2] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from rlhf.bridge import build
from rlhf.data.tokenizer import train_tokenizer
from rlhf.recipe import Chat
from rlhf.recipe import load as load_recipe
from rlhf.tracking import stage_folder

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "studies.toml"
DEADLINE = 5400.0  # seconds of one seed
PICTURES = {"llava_uhd": (672, 1008), "llava15": (336, 336)}  # recipes/bridges whose operations are counted
VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
GATE = re.compile(r"layers\.(\d+)\.gated\.attn_gate$")
DIFFERS = 0.01  # shares of 600 held-out rows: their standard error is 0.02, of two arms on the same rows about half


@dataclass(frozen=True)
class Study:
    """What a paper reports of arms that differ in one thing.

    arms      stages of the recipe, those reported to be better first; "STAGE/METRIC" for a measure of its own
    measure   a metric of them, the "seconds" their steps took, how far their gates are open ("gate", or "gate.LAYER"),
              or the "flops" of a recipe of recipes/bridges
    lower     less is better
    keeps     reported is not that an arm is better than the next, but that it keeps this share of it
    """

    system: str
    asks: str
    reported: str
    arms: tuple[str, ...]
    measure: str = "eval.exact"
    lower: bool = False
    keeps: float | None = None

    @property
    def of(self) -> str:
        """What the measure is, in words."""
        kind = self.measure.removeprefix("eval.exact").lstrip(".")
        if self.measure.startswith("eval.exact"):
            return f"right answers{f' ({kind})' if kind else ''}"
        return {
            "model.trainable": "weights trained",
            "seconds": "seconds",
            "gate": "tanh of the gate",
            "flops": "10¹² operations",
        }[self.measure]

    def of_arm(self, arm: str) -> tuple[str, str]:
        """The stage of an arm, and its measure."""
        stage, _, own = arm.partition("/")
        return stage, own or self.measure


LAVIN = ("lavin-adapters", "lavin-full")
STUDIES = (
    Study(
        "CogVLM",
        "a frozen decoder: experts for pictures in every layer, or a connector alone?",
        "experts",
        ("cogvlm-expert", "cogvlm-none"),
    ),
    Study("LaVIN", "adapters and connector, or everything?", "as good", LAVIN, keeps=0.98),
    Study("LaVIN", "what is to be stored", "0.1 % of it", LAVIN, "model.trainable", lower=True),
    Study("LaVIN", "how long it takes", "71 % less", LAVIN, "seconds", lower=True),
    Study("LLaVA-NeXT", "half of the rows, as many steps", "98 % kept", ("next-50", "next-100"), keeps=0.98),
    Study("LLaVA-NeXT", "three tenths of the rows", "stable", ("next-30", "next-100"), keeps=0.95),
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
        "Flamingo",
        "gated layers before a decoder that is frozen, tuned, or begun anew",
        "frozen 8 % better, then 5 %",
        ("flamingo-frozen", "flamingo-tuned", "flamingo-scratch"),
    ),
    Study(
        "Flamingo",
        "a task shown by examples alone: how many of them?",
        "the more the better",
        tuple(f"flamingo-sources/eval.exact.{shots} shots" for shots in (4, 2, 0)),
    ),
    Study(
        "Flamingo",
        "the same after four examples: learned from pages and pairs, or from pairs alone?",
        "17 % worse without pages",
        ("flamingo-sources", "flamingo-pairs"),
        "eval.exact.4 shots",
    ),
    Study(
        "Flamingo",
        "… or from pages alone?",
        "10 % worse without pairs",
        ("flamingo-sources", "flamingo-pages"),
        "eval.exact.4 shots",
    ),
    Study(
        "Flamingo",
        "how far the gates of layers are open, the last to the first",
        "deeper ones further",
        ("flamingo-frozen/gate.3", "flamingo-frozen/gate.0"),
        "gate",
    ),
    Study(
        "Flamingo",
        "… and after more steps",
        "further",
        ("flamingo-sources", "flamingo-tuned"),
        "gate",
    ),
    Study("BLIP-2, XComposer", "how many queries?", "64 taken after 32", ("qformer-16", "qformer-4")),
    Study(
        "LLaMA-VID",
        "how many tokens of content: 16, 4 or 1?",
        "more read more, one keeps the gist",
        ("llama-vid-4", "llama-vid-2", "llama-vid-1"),
    ),
    Study(
        "SVIT",
        "a quarter of the rows: by their concepts, or at random?",
        "by concepts",
        ("svit-core", "svit-chance"),
    ),
    Study(
        "SVIT",
        "is there a seven, where there is none: as many yes as no, or nine in ten yes?",
        "as many",
        ("presence-balanced", "presence-yes"),
        "eval.exact.absent",
    ),
    Study(
        "OtterHD",
        "a small digit in a large picture, seen with 144, 96, 48 or 24 pixels a side",
        "the more the better",
        ("canvas-144", "canvas-96", "canvas-48", "canvas-24"),
        "eval.exact.read",
    ),
    Study(
        "LLaVA-NeXT",
        "is it a seven, where it is none: seen with 96 pixels a side, or 24?",
        "fewer made up with more",
        ("canvas-96", "canvas-24"),
        "eval.exact.absent",
    ),
    Study(
        "Monkey",
        "four windows of the encoder's own size, or positions interpolated?",
        "windows",
        ("canvas-windows", "canvas-96"),
    ),
    Study(
        "Monkey",
        "windows with adapters of their own, or none?",
        "adapters",
        ("canvas-adapted", "canvas-windows"),
    ),
    Study(
        "LLaVA-UHD",
        "a picture of 672 × 1008, or LLaVA-1.5 at 336 × 336?",
        "94 % of it",
        ("llava_uhd", "llava15"),
        "flops",
        lower=True,
    ),
    Study(
        "LLaVAR",
        "questions about print: learned from print too, or not?",
        "from print",
        ("llavar-print", "llavar-none"),
    ),
    Study(
        "SAIL-VL2 (AdaLRS)",
        "a tenth of a good rate: searched for on the way, or kept?",
        "searched for",
        ("rate-searched", "rate-kept"),
    ),
)


@dataclass(frozen=True)
class Found:
    """A study's values, arms by seeds; verdict: "agrees" where every seed has what is reported, "disagrees" where none
    has it, else "open". A difference below DIFFERS is one that held-out rows cannot tell, and open."""

    study: Study
    values: dict[str, tuple[float, ...]]

    @property
    def verdict(self) -> str:
        """Of the differences between neighbours, or of what is kept, the least of each seed."""
        lines = list(zip(*(self.values[arm] for arm in self.study.arms), strict=True))
        sign, keeps = -1 if self.study.lower else 1, self.study.keeps
        if keeps is not None:
            held = [all(one >= keeps * other for one, other in pairwise(line)) for line in lines]
            return "agrees" if all(held) else "open" if any(held) else "disagrees"
        leads = [min(sign * (one - other) for one, other in pairwise(line)) for line in lines]
        if min(leads) > DIFFERS:
            return "agrees"
        return "disagrees" if max(leads) < -DIFFERS else "open"


def find(study: Study, runs: Sequence[Mapping[str, Mapping[str, float]]]) -> Found:
    """The study's values of runs, one a seed. Raises KeyError for a stage or metric they lack."""
    places = {arm: study.of_arm(arm) for arm in study.arms}
    return Found(study, {arm: tuple(run[stage][metric] for run in runs) for arm, (stage, metric) in places.items()})


def table(found: Sequence[Found]) -> str:
    """Markdown: a line for each study, every arm's mean over seeds, and the least and most of them."""
    lines = [
        "| system | question | measure | reported | here: mean (least to most of the seeds) | |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        study = each.study
        arms = "<br>".join(f"{arm} {spread(values)}" for arm, values in each.values.items())
        lines.append(f"| {study.system} | {study.asks} | {study.of} | {study.reported} | {arms} | {each.verdict} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, least and most over seeds."""
    mean, least, most = (
        f"{value:,.0f}" if value > 100 else f"{value:.1f}" if value > 5 else f"{value:.3f}"
        for value in (statistics.mean(values), min(values), max(values))
    )
    return f"{mean} ({least} to {most})"


def run(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Metrics by stage of a seed's run, which is begun, continued or looked at. Raises RuntimeError where it fails."""
    name = f"studies-seed-{seed}"
    overrides = [f"seed = {seed}", f"name = '{name}'", "tracking.wandb = false"]
    command = [sys.executable, "-m", "rlhf.cli", "run", str(RECIPE)]
    done = subprocess.run(
        [*command, *(part for override in overrides for part in ("-o", override))], cwd=folder, timeout=DEADLINE
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed with status {done.returncode}; the same command continues it")
    home = folder / "runs" / name
    stages = json.loads((home / "summary.json").read_text())["stages"]
    folders = [stage_folder(home, index, stage["name"]) for index, stage in enumerate(stages)]
    return {
        stage["name"]: stage["metrics"] | {"seconds": seconds(folder / "steps.jsonl")} | gates(folder / "artifact")
        for stage, folder in zip(stages, folders, strict=True)
    }


def seconds(steps: Path) -> float:
    """What the trainer's steps of a stage took, those that were lost with a killed process once."""
    lines = map(json.loads, steps.read_text().splitlines()) if steps.exists() else ()
    return sum({line["step"]: line["seconds"]["train"] for line in lines}.values())


def gates(artifact: Path) -> dict[str, float]:
    """|tanh| of the gates by which each layer reads pictures (Flamingo, 2204.14198, figure 6), and their mean; nothing
    of an artifact without any."""
    found = {}
    for path in artifact.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                if match := GATE.search(name):
                    found[f"gate.{match[1]}"] = math.tanh(abs(weights.get_tensor(name).item()))
    return found | ({"gate": statistics.mean(found.values())} if found else {})


def compute(recipe: str, width: int, height: int, text: int = 64) -> float:
    """10¹² operations, a multiplication and an addition being two, by which a bridge of recipes/bridges reads a
    picture and `text` tokens, before a decoder of the size of Vicuna-13B."""
    over = [f"model.bridge.decoder.{key} = {value}" for key, value in VICUNA_13B.items()]
    spec = load_recipe([ROOT / "recipes" / "bridges" / f"{recipe}.toml"], over).model.bridge
    assert spec is not None
    tokenizer = train_tokenizer([""], 300, Chat(), ["<img>", "</img>"])
    with torch.device("meta"):
        model = build(spec, tokenizer, seed=0)[0].model.eval()
    layout = model.geometry.layout(width, height)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        cells = torch.zeros(model.geometry.cells(layout), 3, *model.geometry.tiler.cell)
        model.get_image_features(cells, torch.tensor([layout.size] * len(cells), device="cpu"))
        tokens = model.geometry.num_features(layout) + text
        model.language_model(inputs_embeds=torch.zeros(1, tokens, model.config.text_config.hidden_size))
    return counted.get_total_flops() / 1e12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.studies", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where runs/ lies (default: here)")
    parser.add_argument("--json", type=Path, default=Path("studies.json"))
    parsed = parser.parse_args()
    try:
        counted = {name: {"flops": compute(name, *size)} for name, size in PICTURES.items()}
        runs = [run(seed, parsed.folder) | counted for seed in parsed.seeds]
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"studies: {error}", file=sys.stderr)
        return 1
    found = [find(study, runs) for study in STUDIES]
    parsed.json.write_text(json.dumps([asdict(each) | {"verdict": each.verdict} for each in found], indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
