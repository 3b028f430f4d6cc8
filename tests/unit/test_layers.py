"""The layers of the house, read from the imports themselves (lazy ones included)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VENDOR_HOMES = {
    "deepspeed": {"actors/trainer.py", "actors/optimizer.py"},
    "vllm": {"actors/vllm_worker.py", "actors/masking.py", "actors/vllm_weights.py", "actors/vllm_plugin.py"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, source: str | None = None) -> Iterator[str]:
    """Every module an import statement anywhere in the file names, and literal arguments of import_module."""
    for node in ast.walk(ast.parse(source if source is not None else path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*package, *([node.module] if node.module else [])])
            else:
                base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def top(name: str) -> str:
    return name.partition(".")[0]


def test_the_reader_sees_every_kind_of_import() -> None:
    source = "import ray\ndef f():\n    from vllm.engine import x\n    import_module('deepspeed')\nfrom . import base\n"
    found = set(imports(ROOT / "rewards" / "probe.py", source))
    assert {"ray", "vllm.engine", "deepspeed", "rewards.base"} <= found


def test_rlhf_imports_no_vendor_of_processes() -> None:
    wrong = [
        (p.name, name) for p in modules("rlhf") for name in imports(p) if top(name) in ("ray", "vllm", "deepspeed")
    ]
    assert wrong == []


def test_only_the_command_line_imports_actors() -> None:
    users = {str(p.relative_to(ROOT)) for p in modules("rlhf") for name in imports(p) if top(name) == "actors"}
    assert users <= {"rlhf/cli.py"}


def test_rewards_know_the_lowest_layers_only() -> None:
    allowed = ("rlhf.types", "rlhf.recipe", "rlhf.data")
    wrong = [
        (p.name, name)
        for p in modules("rewards")
        for name in imports(p)
        if top(name) in ("rlhf", "actors", "ray", "vllm", "deepspeed", "torch")
        and not any(name == a or name.startswith(f"{a}.") for a in allowed)
        and name != "rlhf"
    ]
    assert wrong == []


@pytest.mark.parametrize("vendor", sorted(VENDOR_HOMES))
def test_one_vendor_has_one_home(vendor: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ("rlhf", "actors", "rewards")
        for path in modules(package)
        if any(top(name) == vendor for name in imports(path))
    }
    assert users <= VENDOR_HOMES[vendor]


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert [p for package in ("rlhf", "actors", "rewards") for p in modules(package) if p.stem in drawers] == []


@pytest.mark.parametrize("module", ["rlhf.recipe", "rlhf.plan", "rlhf.cli"])
def test_planning_loads_no_torch(module: str) -> None:
    heavy = ("torch", "transformers", "ray", "vllm", "deepspeed")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
