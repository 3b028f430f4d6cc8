"""A model soup: the weighted average of models that began alike (2203.05482; SAIL-VL2 §4: after fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.data.rows import DataError
from rlhf.foreign import open_model


@torch.no_grad()
def average(folders: Sequence[Path], weights: Sequence[float]) -> tuple[Any, Any]:
    """Model and processor whose every weight is the average of those in `folders`, adapters merged in, summed in
    float64. Raises DataError where two have not the same weights."""
    total, sums = sum(weights), dict[str, torch.Tensor]()
    for folder, weight in zip(folders, weights, strict=True):
        model, processor, _ = open_model(str(folder))
        state = dict(model.named_parameters())
        shapes = {name: value.shape for name, value in state.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise DataError(f"{folder} and {folders[0]} have not the same weights, so there is no average of them")
        for name, value in state.items():
            part = value.double() * (weight / total)
            sums[name] = sums[name] + part if name in sums else part
    for name, value in model.named_parameters():
        value.copy_(sums[name])
    return model, processor
