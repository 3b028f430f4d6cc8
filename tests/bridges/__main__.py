"""Every recipe of recipes/bridges, small and whole, and its rollouts beside the trainer; writes bridges.json.

python -m tests.bridges [NAME …] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlhf.plan.derive import last_architecture
from rlhf.recipe import load
from tests.bridges import parity, stages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bridges", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all)")
    parser.add_argument("--json", type=Path, default=Path("bridges.json"))
    parsed = parser.parse_args()
    found: list[dict[str, Any]] = []
    failures = 0
    with parity.engines() as ask:
        for name in parsed.names or stages.RECIPES:
            started = time.monotonic()
            try:
                found.append(one(name, ask))
                said = "gap {gap:.1e}, control {control:.2f}, {} stages".format(len(found[-1]["stages"]), **found[-1])
            except (AssertionError, OSError, TimeoutError, ValueError) as error:
                failures += 1
                said = f"FAILED: {error}"
            print(f"{name:20} {said}, {time.monotonic() - started:.0f} s", flush=True)
            parsed.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failures else 0


def one(name: str, ask: parity.Ask) -> dict[str, Any]:
    """A line of bridges.json. Raises AssertionError where something is not as the recipe or the engine says."""
    full, small = load(stages.files_of(name)[:1]), load(stages.files_of(name))
    with tempfile.TemporaryDirectory(prefix="bridges-") as folder:
        gap = parity.measure(*stages.served(small), ask, Path(folder) / "model")
        assert gap.holds, f"gap {gap.gap:.1e}, control {gap.control:.1e}"
        recipe, made, first = stages.run(name, Path(folder), [])
        stages.check(recipe, made, first)
    architecture = last_architecture(full)
    return {
        "name": name,
        "served": architecture.served,
        "gap": gap.gap,
        "control": gap.control,
        "stages": [stage.name for stage in recipe.stages],
        "parameters": architecture.parameters,
        "tokens_per_image": architecture.image_tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
