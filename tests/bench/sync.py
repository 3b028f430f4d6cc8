"""Both sides of sync_reload: a model of 500 MB on its way from the trainer to the engine, and vLLM's own reload of the
same tensors inside of its process.

    python -m tests.bench.sync MODEL        vLLM's side, in a process of its own; prints one line of JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.ours import last_line, run_stage
from tests.bench.workload import SPEC, VOCABULARY, make_rows, save_model

STEPS, SKIP, RELOADS = 8, 2, 6
DECODER = {
    "type": "qwen3",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 13,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def model_of(folder: Path) -> Path:
    """A dense bridge of 500 MB, made once."""
    model = folder / "model-500mb"
    if not model.exists():
        save_model(SPEC | {"decoder": DECODER}, model, VOCABULARY)
    return model


def ours(folder: Path, seed: int) -> dict[str, Any]:
    """Median seconds of a publish, from the trainer's call to the engine's last parameter, and of its proof."""
    model, rows = model_of(folder), make_rows(folder)
    shape = {"steps": STEPS, "prompts": 2, "group": 2, "max_tokens": 8}
    shape |= {"updates": 1, "staleness": 0, "in_order": "true"}
    lines = run_stage(folder, f"sync-{seed}", seed, model, rows, **shape)
    counted = lines[SKIP:]
    found = {phase: median(line["seconds"][phase] for line in counted) for phase in ("sync", "proof")}
    return found | {"all": [line["seconds"]["sync"] for line in counted]}


def peer(folder: Path, seed: int) -> dict[str, Any]:
    """Median seconds of vLLM's reload."""
    return last_line("sync", model_of(folder))


def main(folder: str) -> None:
    from actors.artifacts import read_weights
    from actors.rollout import EngineSettings
    from actors.vllm_worker import VllmWorker
    from actors.weights import from_array

    worker = VllmWorker(folder, EngineSettings())
    tensors = [(name, from_array(array)) for name, array in read_weights(Path(folder))]
    seconds = []
    for _ in range(RELOADS):
        started = time.perf_counter()
        worker._do(lambda: worker._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)}))
        seconds.append(time.perf_counter() - started)
    worker.close()
    print(json.dumps({"seconds": median(seconds[1:]), "all": seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
