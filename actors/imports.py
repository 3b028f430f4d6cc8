"""Where Ray's workers import from: our packages first, then the user's folder.

Of itself Ray puts the folder first, where a user's own `rewards` would take the place of ours.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import actors
import rewards
import rlhf


def packages() -> list[Path]:
    """The folders of our packages, and of what is known of their distribution: vLLM finds our plugin by it."""
    ours = [Path(package.__path__[0]) for package in (rlhf, actors, rewards)]
    known = [
        Path(str(file.locate())).parent for file in distribution("thinkfusion").files or [] if file.name == "METADATA"
    ]
    return [*ours, *known]


def in_place(folder: Path) -> dict[str, Any]:
    """The runtime environment of a job whose nodes all see this folder and this installation, under the same paths."""
    return {"working_dir": f"local://{folder}", "py_modules": [f"local://{packages()[0].parent}"]}
