"""Both sides of sft_packed: image rows of uneven length, the same 256 of them, each once in the time that counts.

    python -m tests.bench.sft MODEL ROWS SEED       TRL's side, in a process of its own; prints one line of JSON

Replies have a log-normal number of words, median 32 and σ = 0.8, at most 240. TRL cannot pack rows with pictures: its
best of micro-batches of 4, 8, 16 and 32 rows is 8, and its processes get both threads, as ours do.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.ours import HEAD, last_line, run_recipe
from tests.bench.trl_side import COMMON, opened, quiet, timed
from tests.bench.workload import NATURAL, ROWS, make

BATCH, MICRO = 32, 8
EPOCH = ROWS // BATCH  # steps; the first epoch warms up, the second counts
MEDIAN, SIGMA, LONGEST = 32, 0.8, 240
RECIPE = (
    HEAD
    + """
[[stages]]
name = "sft"
kind = "sft"
data = {{ rows = 1.0 }}
steps = {steps}
batch_size = {batch}
lr = 1e-6
evaluate = "none"
checkpoint_every = 1000
"""
)


def rows_of(folder: Path) -> tuple[Path, Path]:
    """(model folder, rows with replies)."""
    model, asked = make(NATURAL, folder)
    rows, draw = folder / "replies.jsonl", np.random.default_rng(1)
    lines = [json.loads(line) for line in asked.read_text().splitlines()]
    for line in lines:
        words = min(LONGEST, max(1, round(MEDIAN * float(np.exp(SIGMA * draw.standard_normal())))))
        line["messages"].append({"role": "assistant", "content": [{"type": "text", "text": " ".join(["red"] * words)}]})
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return model, rows


def ours(folder: Path, seed: int) -> dict[str, Any]:
    """Reply tokens a second over the second epoch, by the command line."""
    model, rows = rows_of(folder)
    name = f"sft-{seed}"
    settings = {"name": name, "seed": seed, "model": model, "rows": rows, "steps": 2 * EPOCH}
    lines = run_recipe(folder, name, RECIPE.format(batch=BATCH, **settings))
    tokens = sum(line["metrics"]["tokens"] for line in lines[EPOCH:])
    seconds = lines[-1]["time"] - lines[EPOCH - 1]["time"]
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds}


def peer(folder: Path, seed: int) -> dict[str, Any]:
    """TRL's seconds over its second epoch."""
    return last_line("sft", *rows_of(folder), seed)


def main(model_folder: str, rows_file: str, seed: int, micro: int = MICRO) -> None:
    from datasets import Dataset
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    model, processor, rows = opened(model_folder, rows_file)
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["messages"][0]["content"][1]["text"]}] for row in rows],
            "completion": [
                [{"role": "assistant", "content": row["messages"][1]["content"][0]["text"]}] for row in rows
            ],
            "images": [[Image.open(Path(rows_file).parent / row["image"])] for row in rows],
        }
    )
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=BATCH // micro,
            max_steps=2 * EPOCH,
            max_length=None,
            seed=seed,
            **COMMON,
        )
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=processor)
        ends = timed(trainer)
    print(json.dumps({"seconds": ends[-1] - ends[EPOCH - 1]}))


if __name__ == "__main__":
    quiet()
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
