"""A run folder as `rlhf run recipes/think_fusion_digits.toml` leaves it, made up but plausible, for the report."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

# name, kind, seconds, steps, accuracy thinking, accuracy direct (None: not measured)
STAGES: list[tuple[str, str, float, int, float | None, float | None]] = [
    ("language", "sft", 48, 120, None, None),
    ("vision", "sft", 62, 160, None, None),
    ("align", "sft", 41, 100, None, None),
    ("instruct", "sft", 95, 240, 0.09, 0.42),
    ("upcycle", "sft", 58, 120, 0.11, 0.47),
    ("long-cot", "sft", 110, 260, 0.58, 0.31),
    ("filter", "synthesize", 24, 0, None, None),
    ("rl-verifiable", "rl", 186, 60, 0.79, 0.34),
    ("judge", "sft", 52, 120, None, None),
    ("reject", "synthesize", 31, 0, None, None),
    ("think-fusion", "sft", 102, 220, 0.77, 0.63),
    ("hard-cases", "synthesize", 26, 0, None, None),
    ("rl-mixed", "rl", 171, 60, 0.88, 0.69),
]
REWARDS = {"rl-verifiable": ("answer", "format"), "rl-mixed": ("answer", "think", "format")}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def picture(digits: list[int], rng: np.random.Generator) -> str:
    data = load_digits()
    tiles = [data.images[rng.choice(np.flatnonzero(data.target == digit))] for digit in digits]
    pixels = np.repeat(np.repeat(np.concatenate(tiles, axis=1) / 16 * 255, 2, axis=0), 2, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def rollout(key: str, digits: list[int], image: str, think: bool, right: bool, formatted: bool, **more: Any) -> Any:
    total = sum(digits)
    said = total if right else total + 1
    if think:
        seen = digits if right else [*digits[:-1], digits[-1] + 1]
        chain = "I see " + ", ".join(map(str, seen)) + ". "
        running = seen[0]
        for digit in seen[1:]:
            chain += f"{running} + {digit} = {running + digit}. "
            running += digit
        completion = f"<think> {chain}</think> \\boxed{{{said}}}" if formatted else f"{chain} {said}"
    else:
        completion = f"\\boxed{{{said}}}" if formatted else str(said)
    parts = {"answer": float(right and formatted), "format": float(formatted)} | more.pop("parts", {})
    return {
        "key": key + ("#think" if think else ""),
        "category": "sum",
        "question": "What is the sum of the digits?",
        "think": think,
        "image": image,
        "completion": completion,
        "answer": str(total),
        "parts": parts,
        "outcome": "scored",
        "value": sum(parts.values()) / len(parts),
        "note": "",
        "verdict": None,
    } | more


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def steps_of(name: str, kind: str, steps: int, rng: np.random.Generator) -> list[Any]:
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        if kind == "sft":
            metrics = {
                "loss": 2.9 * math.exp(-4.5 * done) + 0.22 + rng.normal(0, 0.035),
                "grad_norm": 0.4 + 2 * math.exp(-3 * done) + rng.normal(0, 0.05),
                "lr": 1e-3 * (1 - done),
            }
            seconds = {"rollout": 0.0, "reward": 0.0, "train": 0.33 + rng.normal(0, 0.02), "sync": 0.0, "proof": 0.0}
        else:
            parts = {part: 0.96 - 0.5 * math.exp(-(3 + n) * done) for n, part in enumerate(REWARDS[name])}
            metrics = {f"reward.{part}": value + rng.normal(0, 0.025) for part, value in parts.items()}
            metrics |= {
                "reward": sum(parts.values()) / len(parts) + rng.normal(0, 0.02),
                "loss": rng.normal(0, 0.01),
                "clip_fraction": abs(rng.normal(0.012, 0.004)),
                "logprob_gap.p999": 10 ** rng.normal(-5.05, 0.12),
                "entropy": 0.9 - 0.5 * done,
            }
            seconds = {"rollout": 1.62, "reward": 0.11, "train": 1.04, "sync": 0.06, "proof": 0.04}
            seconds = {phase: value * (1 + rng.normal(0, 0.05)) for phase, value in seconds.items()}
        seconds["checkpoint"] = 0.4 if step % 20 == 0 else 0.0
        if step % 40 == 0:
            metrics["eval.loss"] = metrics["loss"] + 0.05
        lines.append({"step": step, "time": 1.76e9 + step, "seconds": seconds, "metrics": metrics})
    return lines


def write_run(folder: Path, last: int | None = None, failed: bool = False, running: bool = False) -> Path:
    """Write the run up to and with stage number `last` (all if None), which may have failed its gate or still run."""
    rng = np.random.default_rng(7)
    last = len(STAGES) if last is None else last
    questions = [[3, 4, 8], [7, 1, 9], [5, 5, 2], [6, 0, 4], [9, 8, 3], [2, 7, 7], [8, 8, 1], [4, 9, 6]]
    pictures = [picture(digits, rng) for digits in questions]
    hardness = [0.05, 0.3, 0.5, 0.66, 0.74, 0.8, 0.86, 0.95]
    recipe = 'name = "think-fusion-digits"\nseed = 0\n'
    for name, kind, *_ in STAGES:
        recipe += f'\n[[stages]]\nname = "{name}"\nkind = "{kind}"\n'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(recipe)
    summary, parent = [], None
    for index, (name, kind, seconds, steps, think, direct) in enumerate(STAGES[:last]):
        path = folder / "stages" / f"{index + 1:02d}-{name}"
        path.mkdir(parents=True, exist_ok=True)
        final = index == last - 1
        lines = steps_of(name, kind, steps, rng)
        write_lines(path / "steps.jsonl", lines[: len(lines) // 2] if final and running else lines)
        if kind == "rl":
            write_lines(
                path / "rollouts.jsonl",
                [
                    {"step": 20 * (1 + n % 3)}
                    | rollout(
                        f"train/{n}", questions[n], pictures[n], True, n % 4 != 1, n % 5 != 4,
                        parts={"think": float(n % 4 != 1)} if name == "rl-mixed" else {},
                        verdict="sound: every digit read matches the image" if n % 4 != 1
                        else "not sound: the chain reads a digit that is not there",
                        **({"outcome": "timed_out", "value": None, "note": "took longer than 30 s"} if n == 6 else {}),
                    )
                    for n in range(8)
                ],
            )  # fmt: skip
        if final and running:
            break
        metrics: dict[str, float] = {}
        if think is not None and direct is not None:
            examples = []
            for mode, value in (("think", think), ("direct", direct)):
                half = 1.96 * math.sqrt(value * (1 - value) / 512)
                metrics |= {
                    f"eval.{mode}.accuracy": value,
                    f"eval.{mode}.accuracy.low": value - half,
                    f"eval.{mode}.accuracy.high": value + half,
                    f"eval.{mode}.greedy": min(1.0, value + 0.03),
                    f"eval.{mode}.pass@4": min(1.0, value + 0.12),
                }
                for n, digits in enumerate(questions):
                    formatted = not (mode == "think" and name in ("instruct", "upcycle"))
                    examples.append(
                        rollout(f"heldout/{n}", digits, pictures[n], mode == "think", value > hardness[n], formatted)
                    )
            metrics |= {
                "eval.think.format_rate": min(1.0, think + 0.11), "eval.direct.think_rate": 0.01,
                "eval.think.soundness": think - 0.05,
            }  # fmt: skip
            (path / "eval.json").write_text(json.dumps({"metrics": metrics, "examples": examples}))
        if kind == "rl":
            metrics |= {
                "sync_probe.max": 4.8e-6, "logprob_gap.p999": 8.6e-6, "logprob_gap.share_above_1e-4": 2.4e-4,
                "logprob_gap.flips": 12, "rl.clip_fraction": 0.012,
            }  # fmt: skip
        if name == "judge":
            metrics |= {"judge.precision": 0.956, "judge.recall": 0.913, "judge.kappa": 0.842}
            metrics |= {"judge.calibration.0.9.accuracy": 0.97, "judge.calibration.0.9.share": 0.875}
        gates = []
        if think is not None:
            bound = 0.97 if failed and final else round(think - 0.06, 2)
            gates.append(
                {"metric": "eval.think.accuracy", "min": bound, "max": None, "value": think, "passed": think >= bound}
            )
        if name == "judge":
            gates.append({"metric": "judge.precision", "min": 0.9, "max": None, "value": 0.956, "passed": True})
        made = digest(name)
        artifact = {
            "path": f"stages/{path.name}/artifact", "digest": made, "parent": None if name == "judge" else parent,
            "recipe_digest": digest("recipe" + name), "data_digest": digest("data" + name),
        }  # fmt: skip
        parent = parent if name == "judge" or kind == "synthesize" else made
        (path / "manifest.json").write_text(json.dumps(artifact))
        status = "failed" if failed and final else "done"
        summary.append(
            {"name": name, "kind": kind, "seconds": seconds, "status": status, "gates": gates, "metrics": metrics,
             "artifact": artifact}
        )  # fmt: skip
    if not running:
        (folder / "summary.json").write_text(
            json.dumps(
                {
                    "name": "think-fusion-digits",
                    "seed": 0,
                    "wall_seconds": sum(stage["seconds"] for stage in summary) + 41,
                    "peak_rss_gib": 5.3,
                    "stages": summary,
                    "machine": {"cpu": "2 × x86-64", "memory_gib": 24, "gpu": "none", "platform": "Linux"},
                    "versions": {"thinkfusion": "0.1.0", "torch": "2.13.0", "vllm": "0.32.0", "deepspeed": "0.19.8"},
                }
            )
        )
    return folder
