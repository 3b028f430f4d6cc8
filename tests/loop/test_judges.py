"""Reinforcement learning whose rewards are judges of tables, on a fake cast and a real server of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rewards.endpoint import EndpointError
from tests.loop.cast import FakeCast
from tests.loop.test_curriculum import recipe, run, summary
from tests.unit.judge_server import Answer, Server, said

NAME = "rl-verifiable"
FIELDS = ("logic", "grounding", "consistency")


def verdicts(number: int, body: dict[str, Any]) -> Answer:
    """True of every chain in logic, of every other reply in the rest."""
    return said("Let me see. " + json.dumps({name: name == "logic" or number % 2 == 0 for name in FIELDS}))


def improve(prepared: Path, folder: Path, address: str, *overrides: str, **table: Any) -> FakeCast:
    if not folder.exists():
        shutil.copytree(prepared, folder)
    settings = {"endpoint": address, "model": "m", "template": "think", "grammar": "booleans", "fields": [*FIELDS]}
    keys = [f"judges.outside.{key} = {json.dumps(value)}" for key, value in (settings | table).items()]
    stage = f"stages.{NAME} = {{steps = 2, evaluate = 'none', gates = []}}"
    return run(recipe(*keys, stage, f"stages.{NAME}.rewards.think.judge = 'outside'", *overrides), folder, until=NAME)


def result(folder: Path) -> dict[str, Any]:
    return next(stage for stage in summary(folder)["stages"] if stage["name"] == NAME)


def test_an_endpoint_is_a_reward_with_its_parts_and_is_asked_once_a_chain(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Server(verdicts) as server:
        cast = improve(prepared, folder, server.address)
        assert all("judge" not in role for roles in cast.served for role in roles)  # no engine of ours judges
        metrics = result(folder)["metrics"]
        assert metrics["rl.reward.think.logic"] >= metrics["rl.reward.think.grounding"] > 0
        assert metrics["rl.reward.think"] == pytest.approx(
            sum(metrics[f"rl.reward.think.{name}"] for name in FIELDS) / 3
        )
        asked = [body["messages"][0]["content"][-1]["text"] for body in server.bodies]
        assert all(body["messages"][0]["content"][0]["type"] == "image_url" for body in server.bodies)
        assert all("i see it." in text for text in asked)
        count = len(server.bodies)
        improve(prepared, folder, server.address)
        assert len(server.bodies) == count  # the stage is done
        improve(prepared, folder, server.address, f"stages.{NAME}.lr = 2e-5")  # run again: the same is not asked again
        assert len(server.bodies) == count
        assert (folder / "judgements.sqlite").stat().st_size > 0


@pytest.mark.parametrize(
    ("table", "again", "asks"),
    [
        ({"concurrency": 2, "retries": 1, "deadline": 5.0, "cache": False}, False, False),
        ({"model": "another"}, True, True),
        ({"template": "logic"}, True, True),
        ({"missing": 1.0}, True, False),
        ({"budget": 10000}, True, False),
        ({"extra.temperature": 0.5}, True, True),
    ],
    ids=str,
)
def test_what_decides_a_judges_verdicts_makes_the_stage_run_again(
    prepared: Path, tmp_path: Path, table: dict[str, Any], again: bool, asks: bool
) -> None:
    folder = tmp_path / "run"
    with Server(verdicts) as server:
        improve(prepared, folder, server.address)
        before, count = result(folder)["artifact"]["recipe_digest"], len(server.bodies)
        cast = improve(prepared, folder, server.address, **table)
        assert (len(server.bodies) > count) is asks
    assert bool(cast.trainer.begun) is again
    assert (result(folder)["artifact"]["recipe_digest"] != before) is again


def test_an_edited_template_is_another_judge(prepared: Path, tmp_path: Path) -> None:
    folder, own = tmp_path / "run", tmp_path / "own.txt"
    with Server(verdicts) as server:
        own.write_text("is it right? {completion} {format}")
        improve(prepared, folder, server.address, template=str(own))
        before, count = result(folder)["artifact"]["recipe_digest"], len(server.bodies)
        own.write_text("is it well made? {completion} {format}")
        improve(prepared, folder, server.address, template=str(own))
    assert result(folder)["artifact"]["recipe_digest"] != before
    assert len(server.bodies) > count


def test_a_refused_key_stops_the_stage_and_names_the_variable(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "wrong")
    with (
        Server(lambda number, body: Answer(401, b"no")) as server,
        pytest.raises(EndpointError, match="environment variable A_KEY"),
    ):
        improve(prepared, tmp_path / "run", server.address, key_env="A_KEY")


def test_a_judge_that_is_out_of_order_stops_the_stage_by_its_share_of_failures(prepared: Path, tmp_path: Path) -> None:
    with (
        Server(lambda number, body: said("hm")) as server,
        pytest.raises(RuntimeError, match="JSON object of booleans logic, grounding, consistency"),
    ):
        improve(prepared, tmp_path / "run", server.address)


def test_a_budget_holds_over_what_ends_the_run(prepared: Path, tmp_path: Path) -> None:
    with Server(verdicts) as server:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="budget of 3 calls is spent"):
                improve(prepared, tmp_path / "run", server.address, budget=3)
            assert len(server.bodies) == 3


def test_two_judges_of_one_model_share_its_engine(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(prepared, folder)
    tables = [f"judges.{name} = {{artifact = 'instruct', cache = {name == 'one'}}}".lower() for name in ("one", "two")]
    parts = [f"stages.{NAME}.rewards.{name}.judge = '{name}'" for name in ("one", "two")]
    stage = f"stages.{NAME} = {{steps = 1, evaluate = 'none', gates = []}}"
    cast = run(recipe(*tables, *parts, stage), folder, until=NAME)
    assert set(cast.served[-1]) == {"policy", "instruct"}
    assert {"rl.reward.one", "rl.reward.two"} <= result(folder)["metrics"].keys()
