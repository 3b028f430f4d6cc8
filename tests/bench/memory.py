"""Peak memory of one pass for log-probabilities, above what the model itself takes:

    python -m tests.bench.memory chunked|whole SEED

The trainer's pass beside the plain one: logits of every token of every row, then their log-softmax. A vocabulary of
151,936 (Qwen3's), a tiny decoder, rows of which half is prompt. Prints one line of JSON.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

VOCABULARY, ROWS, LENGTH = 151_936, 8, 256
PERIOD = 0.002  # seconds between looks at the process's memory


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` has in memory above those before it."""
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident() - before)
            time.sleep(PERIOD)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most[0]


def main(which: str, seed: int) -> None:
    import torch

    from actors.trainer import TrainerRank
    from rlhf import bridge
    from rlhf.data.tokenizer import train_tokenizer
    from rlhf.recipe import Chat
    from rlhf.types import Batch, Loss, Sample, TrainSpec
    from tests.bench.workload import SPEC

    pick = random.Random(seed)
    rows = tuple(
        Sample(f"row/{i}", tuple(pick.randrange(20, 250) for _ in range(LENGTH)), prompt_length=LENGTH // 2)
        for i in range(ROWS)
    )
    batch = Batch(((rows,),), ROWS * LENGTH // 2, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["how many red"], 300, Chat())
        model, processor = bridge.build(SPEC, tokenizer, seed=0)
        model.resize_token_embeddings(VOCABULARY)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if which == "chunked":
            trainer = TrainerRank(0, 1, "127.0.0.1:29511", threads=2)
            trainer.begin(TrainSpec(folder, seed, Loss(), {"*": 1e-6}, 1, zero_stage=0, packed=True))
            small = Batch((((rows[0],),),), LENGTH // 2, 1)
            trainer.losses(small)  # what a first call sets up stays
            found = peak(lambda: trainer.losses(batch))
            trainer.close()
        else:
            torch.set_num_threads(2)
            ids = torch.tensor([row.token_ids for row in rows])

            def whole(ids: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False).logits.float()
                    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])

            model.eval()
            whole(ids[:1, :8])
            found = peak(lambda: whole(ids))
    print(json.dumps({"bytes": found}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
