"""Where progress goes: the console, JSONL beside the run, TensorBoard and wandb.

    with Tracker(run_folder, recipe.name, recipe.tracking) as tracker:
        with tracker.stage("long-cot", "sft", index=5, total=13, steps=300, resumed=120) as stage:
            stage.log(121, {"loss": 0.7}, {"train": 0.4})
            stage.rollouts(121, records)
            stage.metrics({"eval.think.accuracy": 0.61}, examples)

JSONL is the run's own record: resume and the report read it, so its failure stops the run. Every other sink is a
view. A view that fails is switched off with one warning naming it and training goes on; nothing it would have shown
is lost, because JSONL has it.
"""

from rlhf.tracking.console import Console, duration, headline
from rlhf.tracking.jsonl import Jsonl, TrackingError, keep_until
from rlhf.tracking.sink import record_image, stage_folder
from rlhf.tracking.tracker import StageLog, Tracker
from rlhf.tracking.wandb import Wandb

__all__ = [
    "Console",
    "Jsonl",
    "StageLog",
    "Tracker",
    "TrackingError",
    "Wandb",
    "duration",
    "headline",
    "keep_until",
    "record_image",
    "stage_folder",
]
