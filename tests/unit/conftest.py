"""What the tests of jobs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.recipe import Recipe, load
from tests.unit.toy_recipe import ONLY

RECIPE = f"""
name = "small"
model.path = "./no/such/model"
[cluster]
grace_seconds = 60
{ONLY}"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "small.toml").write_text(RECIPE)
    return load([tmp_path / "small.toml"])
