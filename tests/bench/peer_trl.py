"""TRL's side of the RL rows, in a process of its own:

    python -m tests.bench.peer_trl MODEL ROWS MAX_TOKENS STEPS SKIP SEED

GRPOTrainer on the same model, rows, groups and threads, with Hugging Face's generate: its vLLM mode supports vLLM up to
0.31 and, colocated, crashes at the sync on a CPU. Prints one line of JSON.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

from tests.bench.trl_side import COMMON, opened, quiet, timed

MICRO = 64  # its best of 32, 64 and 256 for natural lengths; for fixed ones 128 is 1 % faster


def main(model_folder: str, rows_file: str, max_tokens: int, steps: int, skip: int, seed: int) -> None:
    from datasets import Dataset
    from PIL import Image
    from trl import GRPOConfig, GRPOTrainer

    from tests.bench.workload import GROUP, PROMPTS

    model, processor, rows = opened(model_folder, rows_file)
    folder = Path(rows_file).parent
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["messages"][0]["content"][1]["text"]}] for row in rows],
            "image": [Image.open(folder / row["image"]) for row in rows],
        }
    )
    tokens: list[int] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [random.random() for _ in completion_ids]

    with tempfile.TemporaryDirectory() as output:
        settings = GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=PROMPTS * GROUP // MICRO,
            num_generations=GROUP,
            max_completion_length=max_tokens,
            max_steps=steps,
            beta=0.0,
            seed=seed,
            **COMMON,
        )
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=settings, train_dataset=data, processing_class=processor
        )
        ends = timed(trainer)
    seconds, counted = ends[-1] - ends[skip - 1], sum(tokens[skip:])
    found = {
        "tokens_per_second": counted / seconds,
        "tokens": counted,
        "seconds": seconds,
        "mean_length": counted / (len(tokens) - skip) / (PROMPTS * GROUP),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    quiet()
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]))
