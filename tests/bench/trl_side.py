"""What both of TRL's sides have: threads, model, rows, settings, and the end of every step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

THREADS = 2
COMMON: dict[str, Any] = {
    "report_to": [],
    "learning_rate": 1e-6,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def quiet() -> None:
    """Before any vendor is imported: nothing is fetched or reported, and as many threads as ours."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", OMP_NUM_THREADS=str(THREADS))


def opened(model_folder: str, rows_file: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    """(model, processor with its chat template, rows)."""
    import torch

    from rlhf import bridge

    torch.set_num_threads(THREADS)
    bridge.register()
    model, processor = bridge.load(model_folder)
    processor.chat_template = processor.tokenizer.chat_template
    return model, processor, [json.loads(line) for line in Path(rows_file).read_text().splitlines()]


def timed(trainer: Any) -> list[float]:
    """Train, and when each step ended, in seconds."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    return ends
