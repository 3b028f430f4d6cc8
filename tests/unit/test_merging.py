"""Averages of models that began alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.data.rows import DataError
from rlhf.remaking import average
from tests.unit.systems import spec
from tests.unit.test_bridge_build import tiny


def saved(folder: Path, name: str, seed: int, **changes: object) -> Path:
    model, processor = tiny(seed, **spec("llava15") | changes)
    model.save_pretrained(folder / name)
    processor.save_pretrained(folder / name)
    return folder / name


def test_an_average_by_hand(tmp_path: Path) -> None:
    folders = [saved(tmp_path, "a", 0), saved(tmp_path, "b", 1), saved(tmp_path, "c", 2)]
    models = [tiny(seed, **spec("llava15"))[0] for seed in range(3)]
    found, processor = average(folders, [1.0, 1.0, 2.0])
    for name, value in found.named_parameters():
        one, two, three = (model.get_parameter(name).double() for model in models)
        torch.testing.assert_close(value.double(), (one + two + 2 * three) / 4, atol=1e-6, rtol=0)
    assert processor.geometry == found.config.geometry
    alone, _ = average(folders[:1] * 2, [1.0, 3.0])
    assert all(torch.equal(value, models[0].get_parameter(name)) for name, value in alone.named_parameters())


def test_other_weights_have_no_average(tmp_path: Path) -> None:
    folders = [saved(tmp_path, "a", 0), saved(tmp_path, "b", 0, connector={"type": "mlp", "kind": "linear"})]
    with pytest.raises(DataError, match="have not the same weights"):
        average(folders, [1.0, 1.0])
