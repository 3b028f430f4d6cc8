"""What of a user's folder is sent to a cluster."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from actors.jobs import JobError, archive
from actors.jobs.archive import archive_of
from rlhf.recipe import Recipe, validate

STAGE = {"name": "only", "kind": "sft", "data": {"rows": 1}, "steps": 1, "batch_size": 1}


def recipe(**more: Any) -> Recipe:
    return validate({"name": "small", "model": {"path": "/models/m"}, "stages": [STAGE], **more}, "here")


def write(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def sent(folder: Path, *files: str, of: Recipe | None = None) -> set[str]:
    return set(map(str, archive_of(folder, files, of or recipe(), [folder / "runs"]).files))


def test_caches_runs_and_environments_stay(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", "mine/reward.py", "mine/__pycache__/reward.pyc", "runs/a/summary.json")
    write(tmp_path, "env/pyvenv.cfg", "env/lib/x.py", ".cache/CACHEDIR.TAG", ".cache/y")
    assert sent(tmp_path) == {"a.toml", "mine/reward.py"}


def test_what_git_ignores_stays_and_what_it_does_not_know_yet_goes(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True, timeout=30)
    write(tmp_path, "a.toml", "data/big.bin", "inner/b.py", "inner/c.log")
    write(tmp_path, ".gitignore", text="data/\n")
    write(tmp_path, "inner/.gitignore", text="*.log\n")
    subprocess.run(["git", "-C", tmp_path, "add", "a.toml"], check=True, timeout=30)
    assert sent(tmp_path) == {".gitignore", "a.toml", "inner/.gitignore", "inner/b.py"}
    assert sent(tmp_path / "inner") == {".gitignore", "b.py"}  # what is ignored is known above it
    subprocess.run(["git", "init", "--quiet", tmp_path / "inner"], check=True, timeout=30)  # a repository within
    absent = ["update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},absent"]  # and one that was not fetched
    subprocess.run(["git", "-C", tmp_path, *absent], check=True, timeout=30)
    (tmp_path / "absent").mkdir()
    assert sent(tmp_path) == {".gitignore", "a.toml", "inner/.gitignore", "inner/b.py"}


def test_what_the_recipe_names_must_be_sent_or_absolute(tmp_path: Path) -> None:
    write(tmp_path, "rows.jsonl", "env/pyvenv.cfg", "env/rows.jsonl")
    assert sent(tmp_path, of=recipe(data={"rows": {"path": "rows.jsonl"}})) == {"rows.jsonl"}
    with pytest.raises(JobError, match=r"data.rows.path = 'env/rows.jsonl' is not sent to the cluster"):
        sent(tmp_path, of=recipe(data={"rows": {"path": "env/rows.jsonl"}}))
    (tmp_path.parent / "m").mkdir(exist_ok=True)
    with pytest.raises(JobError, match=r"model.path = '../m' is not sent to the cluster"):
        sent(tmp_path, of=recipe(model={"path": "../m"}))
    assert sent(tmp_path, of=recipe(data={"rows": {"path": str(tmp_path / "env/rows.jsonl")}})) == {"rows.jsonl"}


def test_nothing_is_recorded_into_a_copy(tmp_path: Path) -> None:
    stage = {"name": "practice", "kind": "rl", "data": {"rows": 1}, "steps": 1, "prompts_per_step": 1}
    rewards = {"answer": {"function": "rewards.answer:boxed"}}
    with pytest.raises(JobError, match=r"stages.practice.record = 'kept': the job's folder is a copy"):
        sent(tmp_path, of=recipe(stages=[{**stage, "rewards": rewards, "record": "kept"}]))


def test_too_much_is_refused_with_what_is_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LIMIT_MIB", 1)
    write(tmp_path, "models/a/one.bin", "models/a/two.bin", text="x" * 2**20)
    write(tmp_path, "small.py")
    with pytest.raises(JobError, match=r"has 2 MiB to send, and 1 can be: models/a \(2 MiB\), small.py \(0 MiB\)"):
        sent(tmp_path)


def test_recipes_from_elsewhere_go_along(tmp_path: Path) -> None:
    write(tmp_path, "user/own.toml", "site/base.toml")
    folder = tmp_path / "user"
    files = ("../site/base.toml", str(tmp_path / "site/base.toml"), "own.toml")
    made = archive_of(folder, files, recipe(), [tmp_path / "runs"])
    assert made.recipes == {files[0]: ".recipes/0-base.toml", files[1]: ".recipes/1-base.toml"}
    made.write(tmp_path / "first.zip")
    made.write(tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.zip") as zipped:
        assert zipped.namelist() == ["own.toml", ".recipes/0-base.toml", ".recipes/1-base.toml"]


def test_run_folders_stay_however_they_are_called(tmp_path: Path) -> None:
    write(tmp_path, "user/a.toml", "user/runs/r/model.bin", "user/shared/r/model.bin")
    folder = tmp_path / "user"
    (tmp_path / "link").symlink_to(folder)
    runs = [tmp_path / "user" / ".." / "user" / "runs", tmp_path / "link" / "shared", tmp_path / "elsewhere"]
    assert [*map(str, archive_of(folder, [], recipe(), runs).files)] == ["a.toml"]


def test_keys_and_tokens_stay_wherever_they_lie(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", ".jobs/j.json", ".ray/token", "others/.jobs/j.json", "others/.ray/token")
    assert sent(tmp_path) == {"a.toml"}


def test_run_folders_among_what_is_sent_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", "small/stages/01-only/model.bin")
    with pytest.raises(JobError, match=rf"^{tmp_path} is sent to the cluster, and run folders, .* with --runs or clus"):
        archive_of(tmp_path, ["a.toml"], recipe(), [tmp_path / "a" / "..", tmp_path / "elsewhere"])


def test_what_cannot_be_sent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "secret.txt")
    made = archive_of(tmp_path, [], recipe(), [])

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(JobError, match=r"secret.txt: cannot be read \(Permission denied\), and goes with a job"):
            made.write(tmp_path / "made.zip")
    (tmp_path / os.fsdecode(b"bad-\xff-name.txt")).write_text("x")
    with pytest.raises(JobError, match=r"'bad-.udcff-name.txt': the name is not UTF-8"):
        archive_of(tmp_path, [], recipe(), [])
