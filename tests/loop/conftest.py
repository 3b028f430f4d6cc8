"""A run on fakes that several modules continue."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loop.test_curriculum import recipe, run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Up to the stage before reinforcement learning, to copy."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    run(recipe(), folder, until="difficulty")
    return folder
