"""Rollouts kept on disk, and learned from again without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.loop.cast import FakeCast, FakeEngine, FakeRewards
from tests.loop.test_online import NAME, Uneven, go_on, improve, share_of


def recorded(prepared: Path, tmp_path: Path, more: str = "") -> tuple[FakeCast, Path]:
    record = tmp_path / "record"
    return improve(prepared, tmp_path / "live", f"steps = 3, record = '{record}'{more}"), record


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_record_teaches_what_the_run_taught(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    staleness: int,
) -> None:
    with monkeypatch.context() as patch:
        if staleness:
            Uneven(patch, late=12, steps=3, mixed=True)
        live, record = recorded(prepared, tmp_path, f", refill_rounds = 0, max_staleness = {staleness}")
    assert [path.name for path in sorted(record.glob("*.json"))] == [
        "record.json",
        *(f"step-{index:06d}.json" for index in range(3)),
    ]

    async def never(*_: Any) -> Any:
        raise AssertionError("a replay neither samples nor scores")

    monkeypatch.setattr(FakeEngine, "generate", never)
    monkeypatch.setattr(FakeRewards, "score", never)
    again = improve(prepared, tmp_path / "again", f"steps = 3, replay = '{record}'")
    assert again.trainer.batches == live.trainer.batches
    assert again.served[-1] == {}
    steps = [(tmp_path / run / "stages").glob(f"*-{NAME}/steps.jsonl") for run in ("live", "again")]
    first, second = ([json.loads(line)["metrics"] for line in next(path).read_text().splitlines()] for path in steps)
    assert sum(line.get("stale_tokens", 0) for line in first) > 0 or not staleness
    for ours, theirs in zip(first, second, strict=True):
        assert 0.0 < ours["scoring_lag"] <= ours["scoring_lag.max"]
        assert ours.items() >= theirs.items()  # but for what only an engine can tell
        assert {name.partition(".")[0].partition("_")[0] for name in ours.keys() - theirs.keys()} <= {
            "sync",
            "staleness",
            "stale",
            "scoring",
        }


def test_a_stage_that_only_samples_goes_on_where_it_was(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = (f"steps = 4, learn = false, record = '{tmp_path / name}'" for name in ("whole", "parts"))
    cast = improve(prepared, tmp_path / "one", whole)
    assert not cast.trainer.begun
    assert not next((tmp_path / "one/stages").glob(f"*-{NAME}/artifact"), None)
    generate, asked = FakeEngine.generate, [0]

    async def dies(engine: FakeEngine, prompts: Any, sampling: Any) -> Any:
        asked[0] += len(prompts)
        if asked[0] > 2 * share_of(1):
            raise RuntimeError("gone")
        return await generate(engine, prompts, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "generate", dies)
        with pytest.raises(RuntimeError, match="gone"):
            improve(prepared, tmp_path / "two", parts)
    before = len(list((tmp_path / "parts").glob("step-*.json")))
    assert 0 < before < 4
    go_on(tmp_path / "two", parts)
    lines = next((tmp_path / "two/stages").glob(f"*-{NAME}/steps.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    for path in (tmp_path / "whole").glob("*.json"):
        assert (tmp_path / "parts" / path.name).read_text() == path.read_text()


def test_a_damaged_record_is_named(prepared: Path, tmp_path: Path) -> None:
    _, record = recorded(prepared, tmp_path)
    picture = next((record / "media").iterdir())
    kept = picture.read_bytes()
    picture.write_bytes(b"another")
    with pytest.raises(ValueError, match=rf"{picture.name} is missing or was changed"):
        improve(prepared, tmp_path / "a", f"steps = 3, replay = '{record}'")
    picture.write_bytes(kept)
    with pytest.raises(ValueError, match=r"step-000003.json is missing: the record has 3 steps"):
        improve(prepared, tmp_path / "b", f"steps = 4, replay = '{record}'")
    (record / "step-000001.json").write_text('{"parts": [{}]}')
    with pytest.raises(ValueError, match=r"step-000001.json is no step of a record \(KeyError: 'seen'\)"):
        improve(prepared, tmp_path / "c", f"steps = 3, replay = '{record}'")


def test_another_record_is_another_stage(prepared: Path, tmp_path: Path) -> None:
    _, record = recorded(prepared, tmp_path)
    settings = f"steps = 3, replay = '{record}'"
    improve(prepared, tmp_path / "again", settings)
    assert not go_on(tmp_path / "again", settings).trainer.begun
    (record / "note.txt").write_text("changed")
    assert go_on(tmp_path / "again", settings).trainer.begun
