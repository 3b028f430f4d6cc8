"""`rlhf reward`: what is told of a reward that is tried, and a beginning for a new one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rewards.bias import kappa
from rlhf.cli import main
from rlhf.trial import answered, rolled_out
from tests.unit.judge_server import Answer, Server, said

REWARD = """
def right(item, worth=1.0):
    if item.completion == "odd":
        raise ValueError("cannot read odd")
    return worth * (item.completion == item.columns["answer"])

def all_yes(item):
    return 1.0
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(REWARD)
    lines = [
        {
            "prompt": [{"role": "user", "content": f"what is {place}?"}],
            "completion": said,
            "answer": "7",
            "sound": sound,
        }
        for place, (said, sound) in enumerate([("7", 1), ("7", 0), ("8", 0), ("odd", 1), ("7", 1)])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_what_is_told_of_a_reward(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    function, out, page = f"{rows.parent}/mine.py:right", rows.parent / "found.json", rows.parent / "found.html"
    told = ["reward", "test", function, "--data", str(rows), "--json", str(out), "--html", str(page)]
    assert main([*told, "--truth", "sound", "--option", "worth = 0.5"]) == 0
    found = json.loads(out.read_text())
    assert found.pop("seconds") > 0
    values = [0.5, 0.5, 0.0, None, 0.5]
    assert found == {"count": 5, "scored": 4, "failed": 1, "timed_out": 0, "values": values}
    text = capsys.readouterr().out
    for part in (
        "5 completions: 4 scored, 1 failed, 0 timed out",
        "ValueError: cannot read odd",
        "empty: 0.000",
        "Beside column sound",
        "4 that both scored; yes is at least a half: κ = 0.500",
        "row 1: 0.5 against 0: 'what is 1?' → '7'",
    ):
        assert part in text
    assert "What it fails on" in page.read_text()


def test_beside_another_reward(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = f"{rows.parent}/mine.py"
    assert main(["reward", "test", f"{home}:all_yes", "--data", str(rows), "--against", f"{home}:right"]) == 0
    text = capsys.readouterr().out
    assert "all the same: nothing can be learned from it" in text
    assert "row 2: 1 against 0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{home}/mine.py:wrong", "--data", "{home}/rows.jsonl"], "has no function 'wrong'; it has right, all_yes"),
        (["{home}/mine.py:right", "--data", "{home}/none.jsonl"], "no such file or folder"),
        (["{home}/mine.py:right", "--data", "{home}/rows.jsonl", "--truth", "no"], "rows/0: no number in column 'no'"),
        (["{home}/mine.py:right", "--data", "{home}/rows.jsonl", "--option", "x"], "--option: "),
        (["{home}/mine.py:right", "--rollouts", "{home}"], "no stages/*/rollouts.jsonl"),
        (["{home}/mine.py:right", "--data", "{home}/bare.jsonl"], "bare.jsonl, row 0: needs `prompt`"),
    ],
)
def test_what_cannot_be_tried(
    arguments: list[str], message: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (rows.parent / "bare.jsonl").write_text('{"prompt": "what?"}')
    assert main(["reward", "test", *(argument.format(home=rows.parent) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_question_in_messages_and_its_completion(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "what?"}], "completion": "8", "answer": "8"}))
    (item,) = answered(path)
    assert (item.question, item.completion, item.columns["answer"]) == ("what?", "8", "8")


def test_a_trial_ends_in_time(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = rows.read_text()
    rows.write_text("\n".join([lines] * 40))
    told = ["reward", "test", f"{rows.parent}/mine.py:right", "--data", str(rows), "--minutes", "0"]
    assert main([*told, "--truth", "sound"]) == 0
    assert "64 completions" in (text := capsys.readouterr().out)
    assert "no time was left for 136 more" in text
    assert main([*told, "--option", "worth = 2020-01-01"]) == 2
    assert "write it as text" in capsys.readouterr().err


def test_rollouts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = tmp_path / "stages" / "01-rl"
    stage.mkdir(parents=True)
    kept = {"key": "s/0", "question": "what?", "completion": "\\boxed{8}", "think": False, "image": None, "answer": "8"}
    kept |= {"category": "sum", "tokens": 5, "finish": "length", "columns": {"answer": "8", "level": 3}}
    (stage / "rollouts.jsonl").write_text(json.dumps(kept))
    assert main(["reward", "test", "rewards.answer:boxed", "--rollouts", str(tmp_path)]) == 0
    assert "every digit boxed: 0.000" in capsys.readouterr().out  # the last box counts
    (item,) = rolled_out(tmp_path)
    assert (item.finished, item.num_tokens, item.columns["level"], item.prompt.source) == (False, 5, 3, "01-rl")
    (stage / "rollouts.jsonl").write_text("")
    assert main(["reward", "test", "rewards.answer:boxed", "--rollouts", str(tmp_path)]) == 2
    assert "are empty" in capsys.readouterr().err
    (stage / "rollouts.jsonl").write_text('{"key": 1}')
    assert main(["reward", "test", "rewards.answer:boxed", "--rollouts", str(tmp_path)]) == 2
    assert "rollouts.jsonl:1: no rollout" in capsys.readouterr().err


def test_one_to_begin_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reward", "new", "tidy"]) == 0
    assert capsys.readouterr().out.split() == ["tidy.py", "test_tidy.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_tidy.py"]
    passed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert passed.returncode == 0, passed.stdout
    assert main(["reward", "new", "tidy"]) == 2
    assert "tidy.py is there already" in capsys.readouterr().err
    for wrong in ("no name", "class", "json", "sys", "rlhf"):
        assert main(["reward", "new", wrong]) == 2
        assert repr(wrong) in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tidy.py", "test_tidy.py"}


def test_agreement_beyond_chance() -> None:
    assert kappa([True, True, False, False], [True, True, False, False]) == 1.0
    assert kappa([True, True, False, False], [True, False, True, False]) == 0.0
    assert kappa([True, False], [False, True]) == -1.0
    assert kappa([True, True], [True, True]) == 1.0


JUDGES = """
[judges.thinking]
endpoint = "{address}"
model = "m"
template = "logic"
retries = 0

[judges.ours]
artifact = "judge"

[judges.odd]
endpoint = "{address}"
models = "m"
"""


def test_a_judge_is_tried_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that likes what is long, and of two replies the first."""

    def likes_length(number: int, body: dict[str, Any]) -> Answer:
        text = body["messages"][0]["content"]
        if "Two assistants" in text:
            return said("The first came first.\nfirst: 8, second: 4")
        if "breaks" in text:
            return Answer(status=500)
        return said("yes" if "nothing out" in text or "long" in text else "no")

    rows = tmp_path / "rows.jsonl"
    chains = ["<think>a long chain</think>8", "<think>short</think>8", "<think>breaks</think>8", "no chain"]
    lines = [
        {"prompt": "so?", "completion": chain, "sound": place == 0, "rejected": "<think>nine</think>9"}
        for place, chain in enumerate(chains)
    ]
    rows.write_text("\n".join(map(json.dumps, lines)))
    with Server(likes_length) as server:
        (tmp_path / "site.toml").write_text(JUDGES.format(address=server.address))
        judge = f"{tmp_path}/site.toml:judges.thinking"
        told = ["reward", "test", judge, "--data", str(rows)]
        assert main([*told, "--truth", "sound", "--json", str(tmp_path / "found.json")]) == 0
        text = capsys.readouterr().out
        assert main([*told, "--against", judge]) == 0
        assert "κ = 1.000" in capsys.readouterr().out
        for name, message in (
            ("ours", 'evaluate = "judge"'),
            ("none", "no [judges.none]"),
            ("odd", "odd.models'; did you mean 'model'?"),
        ):
            assert main(["reward", "test", f"{tmp_path}/site.toml:judges.{name}", "--data", str(rows)]) == 2
            assert message in capsys.readouterr().err
        assert main([*told, "--option", "a = 1"]) == 2
        assert "a judge takes no options" in capsys.readouterr().err
    assert json.loads((tmp_path / "found.json").read_text())["values"] == [1.0, 0.0, None, 0.0]
    for part in (
        "4 completions: 3 scored, 1 failed",
        "500 ''",
        # the one without a chain is judged by nobody, before and after
        "verbosity: five empty sentences change 33% of 3 scores, by +0.333 on average",
        "position: the order decides 100% of 4 pairs; completions get 100 % of what the rejected replies",
        "κ = 1.000",
    ):
        assert part in text


def test_a_judge_that_refuses_everybody_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "so?", "completion": "<think>so</think>8"}))
    with Server(lambda number, body: Answer(status=401)) as server:
        (tmp_path / "site.toml").write_text(JUDGES.format(address=server.address))
        assert main(["reward", "test", f"{tmp_path}/site.toml:judges.thinking", "--data", str(rows)]) == 2
    assert "refuses the key" in capsys.readouterr().err
