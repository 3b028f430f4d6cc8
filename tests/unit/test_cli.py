"""What a user sees who gets something wrong: a sentence that names it, a nonzero status, nothing started."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli import _explained, main
from rlhf.preemption import Preemption

RECIPE = Path(__file__).parents[2] / "recipes" / "think_fusion_digits.toml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(arguments)
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, shown = run(capsys, "run", str(RECIPE), "--runs", str(tmp_path), "-o", "stages.long-cot.stepz = 3")
    assert status == 2
    assert "unknown key 'stages.long-cot.stepz'; did you mean 'steps'?" in shown
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, shown = run(capsys, "plan", str(tmp_path / "none.toml"))
    assert status == 2
    assert "none.toml: cannot be read" in shown


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "rlhf.cli", "plan", str(RECIPE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        shown.stdout.close()
        assert (shown.stderr.read(), shown.wait(timeout=120)) == ("", 0)


def test_an_impossible_batch_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, shown = run(
        capsys, "run", str(RECIPE), "--runs", str(tmp_path), "-o", "stages.rl-verifiable.updates_per_step = 3"
    )
    assert status == 2
    assert "stage 'rl-verifiable'" in shown
    assert not list(tmp_path.iterdir())


def test_a_plan_of_the_shipped_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, shown = run(capsys, "plan", str(RECIPE), "--runs", str(tmp_path))
    assert status == 0
    assert "2 engine cold start(s)" in shown
    assert "rl-mixed" in shown


def test_a_folder_in_use_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "think-fusion-digits"
    folder.mkdir()
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, shown = run(capsys, "run", str(RECIPE), "--runs", str(tmp_path))
    assert status == 2
    assert "another `rlhf run` is using this run folder" in shown


def test_a_file_system_without_locks_is_no_other_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    status, shown = run(capsys, "run", str(RECIPE), "--runs", str(tmp_path))
    assert status == 2
    assert "think-fusion-digits: its file system locks no files (No locks available)" in shown


def test_a_folder_that_is_no_run_has_no_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_report_of_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, shown = run(capsys, "report", str(tmp_path / "none"))
    assert status == 2
    assert "no such run folder" in shown


def test_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, shown = run(capsys, "run", str(RECIPE), "--runs", str(tmp_path / "file"))
    assert status == 2
    assert "cannot be made (Not a directory); choose another folder with --runs" in shown


def test_what_an_actor_raised_is_told_without_its_wrapping(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayTaskError

    async def fails(_: Preemption) -> None:
        cause = ValueError("train: the glob 'x.*' matches no parameter")
        raise RayTaskError("begin", "long traceback", cause).as_instanceof_cause()

    monkeypatch.delenv("RLHF_TRACEBACK", raising=False)
    status = asyncio.run(_explained(fails, "do it again", Preemption()))
    shown = capsys.readouterr().err
    assert status == 1
    assert shown == (
        "rlhf: ValueError: train: the glob 'x.*' matches no parameter\ndo it again; RLHF_TRACEBACK=1 shows where\n"
    )


@pytest.mark.parametrize("more", ["", "cpus = 1, memory_gib = 0.0001"])
def test_what_does_not_fit_its_cluster_is_not_submitted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    monkeypatch.chdir(RECIPE.parents[1])
    model = [] if more else ["recipes/models/sail_vl2_30b_a3b.toml"]
    given = [str(RECIPE), *model, "--cluster", "recipes/sites/slurm.toml", "--runs", str(tmp_path)]
    override = ["-o", f"cluster.nodes = [{{{more}}}]"] if more else []
    planned, submitted = (run(capsys, *verb, *given, *override) for verb in (["plan"], ["submit", "--dry-run"]))
    assert planned == submitted
    assert submitted[0] == 2


def test_an_interrupted_look_at_a_job_ends_no_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("actors.jobs.logs", interrupted)
    status, shown = run(capsys, "logs", "digits-20261129-101112-0a1b", "--follow")
    assert (status, shown) == (
        130,
        "rlhf: interrupted; `rlhf list` tells what became of the job\n",
    )


def test_a_list_of_no_jobs_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, shown = run(capsys, "list", "--runs", str(tmp_path))
    assert status == 0
    assert shown == f"no jobs in {tmp_path}: `rlhf submit` makes one, and --runs names another folder\n"


def test_bridges_are_listed_with_what_a_picture_becomes(capsys: pytest.CaptureFixture[str]) -> None:
    folder = RECIPE.parent / "bridges"
    names = ("llava15", "flamingo", "qwen_vl")
    status, shown = run(capsys, "bridges", *(str(folder / f"{name}.toml") for name in names), "--size", "500x375")
    assert status == 0
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()] == ["recipe", *names]
    llava15 = next(line for line in lines if line.startswith("llava15"))
    assert "576" in llava15
    assert "align: connector" in llava15
    assert "at-448: vision.image_size = 448, tiler.size = 448" in shown
    status, shown = run(capsys, "bridges", str(RECIPE), "--size", "wide")
    assert (status, "--size wide: write width and height" in shown) == (2, True)
    status, shown = run(capsys, "bridges", str(folder / "none.toml"))
    assert (status, "none.toml: cannot be read" in shown) == (2, True)


def test_the_page_of_bridges_has_the_table_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPE.parents[1])
    status, shown = run(capsys, "bridges", "--markdown")
    assert status == 0
    assert shown.strip() in (RECIPE.parent / "bridges" / "README.md").read_text()
