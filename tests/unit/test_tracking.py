import io
import json
import math
import threading
from pathlib import Path

import psutil
import pytest
from PIL import Image
from rich.console import Console as Terminal

from rlhf.recipe import Tracking
from rlhf.tracking import Console, Tracker, TrackingError, Wandb, duration, headline, keep_until, record_image


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def record(**more):
    image = record_image(png((16, 8)), (16, 8))
    return {"key": "digits/1", "question": "sum?", "image": image, "completion": "\\boxed{3}", "answer": "3"} | more


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Spy:
    """A sink that remembers, and fails when it is told to."""

    name = "spy"

    def __init__(self, fail: bool = False) -> None:
        self.calls: list[str] = []
        self.fail = fail

    def __getattr__(self, call):
        def called(*arguments):
            self.calls.append(call)
            if self.fail and call == "log":
                raise OSError("disk on fire")

        return called


def plain(interval: float) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(Terminal(file=out, width=300, force_terminal=False), interval), out


def test_everything_logged_lies_in_the_stage_folder(tmp_path):
    with Tracker(tmp_path, "run", sinks=[]) as tracker, tracker.stage("long-cot", "sft", 5, 13) as stage:
        stage.log(1, {"loss": 0.5, "bad": math.nan}, {"train": 0.25})
        stage.rollouts(1, [record()])
        stage.metrics({"eval.think.accuracy": 0.75}, [record(think=True)])
        stage.artifact({"path": "model", "digest": "abc"})
    folder = tmp_path / "stages" / "06-long-cot"
    (step,) = lines(folder / "steps.jsonl")
    assert step["metrics"] == {"loss": 0.5, "bad": None}
    assert step["seconds"] == {"train": 0.25}
    assert lines(folder / "rollouts.jsonl")[0] == {**record(), "step": 1}
    assert json.loads((folder / "eval.json").read_text())["metrics"] == {"eval.think.accuracy": 0.75}
    assert json.loads((folder / "manifest.json").read_text())["digest"] == "abc"


def test_resume_doubles_no_step(tmp_path):
    def go(steps, resumed):
        with Tracker(tmp_path, "run", sinks=[]) as tracker, tracker.stage("s", "rl", 0, 1, resumed=resumed) as stage:
            for step in steps:
                stage.log(step, {"loss": float(step)}, {})
                stage.rollouts(step, [record()])

    path = tmp_path / "stages" / "01-s" / "steps.jsonl"
    go(range(1, 8), None)
    with path.open("a") as file:
        file.write('{"step": 8, "metr')  # the kill came in the middle of a line
    go(range(5, 10), 4)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [line["step"] for line in lines(path.with_name("rollouts.jsonl"))] == list(range(1, 10))
    go([1], None)
    assert [line["step"] for line in lines(path)] == [1]


def test_a_broken_record_in_the_middle_names_its_line(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(TrackingError, match=r"steps\.jsonl:2"):
        keep_until(path, 5)
    assert path.read_text().count("\n") == 3


def test_a_failing_view_warns_once_and_training_goes_on(tmp_path):
    broken, healthy = Spy(fail=True), Spy()
    with Tracker(tmp_path, "run", sinks=[broken, healthy]) as tracker, tracker.stage("s", "rl", 0, 1) as stage:
        with pytest.warns(UserWarning, match="spy tracking failed.*disk on fire"):
            stage.log(1, {"loss": 1.0}, {})
        stage.log(2, {"loss": 1.0}, {})
    assert broken.calls == ["open_stage", "log", "close"]
    assert healthy.calls == ["open_stage", "log", "log", "close_stage", "close"]
    assert len(lines(tmp_path / "stages" / "01-s" / "steps.jsonl")) == 2


def test_a_record_that_cannot_be_written_stops_the_run(tmp_path):
    with Tracker(tmp_path, "run", sinks=[]) as tracker, tracker.stage("s", "rl", 0, 1) as stage:
        (tmp_path / "stages" / "01-s" / "steps.jsonl").mkdir()
        with pytest.raises(IsADirectoryError):
            stage.log(1, {"loss": 1.0}, {})


def test_sinks_are_closed_when_the_loop_fails(tmp_path):
    spy = Spy()
    with (
        pytest.raises(ZeroDivisionError),
        Tracker(tmp_path, "run", sinks=[spy]) as tracker,
        tracker.stage("s", "rl", 0, 1),
    ):
        raise ZeroDivisionError
    assert spy.calls == ["open_stage", "close_stage", "close"]


def test_plain_console_never_floods_nor_prints_images(tmp_path):
    console, out = plain(interval=1e9)
    with Tracker(tmp_path, "run", sinks=[console]) as tracker, tracker.stage("s", "rl", 1, 4, steps=500) as stage:
        for step in range(1, 501):
            stage.log(step, {"loss": 0.25, "reward": 0.5}, {})
            stage.rollouts(step, [record()])
        stage.metrics({"eval.think.accuracy": 0.75}, [record()])
    printed = out.getvalue().splitlines()
    assert len(printed) == 4
    assert printed[0] == "[2/4 s] rl starts"
    assert printed[1] == "[2/4 s] step 500/500  loss 0.25 · reward 0.5"
    assert printed[2] == "[2/4 s] think.accuracy 0.75"
    assert printed[3].startswith("[2/4 s] done after ")
    assert "base64" not in out.getvalue()


def test_plain_console_speaks_during_a_long_step(tmp_path):
    spoke = threading.Event()

    class Listening(io.StringIO):
        def write(self, text):
            if "running for" in text:
                spoke.set()
            return super().write(text)

    console = Console(Terminal(file=Listening(), width=300, force_terminal=False), interval=0.02)
    with Tracker(tmp_path, "run", sinks=[console]) as tracker, tracker.stage("s", "rl", 0, 1):
        assert spoke.wait(10)


def test_live_console_shows_bars(tmp_path):
    out = io.StringIO()
    console = Console(Terminal(file=out, width=160, force_terminal=True))
    with Tracker(tmp_path, "run", sinks=[console]) as tracker, tracker.stage("s", "rl", 0, 2, steps=3) as stage:
        for step in (1, 2, 3):
            stage.log(step, {"reward": 0.5}, {})
    assert "curriculum" in out.getvalue()
    assert "done after" in out.getvalue()


@pytest.mark.timeout(120)
def test_tensorboard_events_can_be_read_back(tmp_path):
    settings = Tracking(tensorboard=True, wandb=False)
    with Tracker(tmp_path, "run", settings) as tracker, tracker.stage("s", "rl", 0, 1) as stage:
        stage.log(1, {"loss": 0.5}, {"train": 2.0})
        stage.log(2, {"loss": 0.25}, {"train": 2.0})
        stage.rollouts(2, [record()])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "01-s"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("seconds/train")[0].value == 2.0


@pytest.mark.timeout(180)
def test_wandb_offline_keeps_its_id_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    (tmp_path / "model").mkdir()
    for resumed in (None, 1):
        sink = Wandb(tmp_path, "run", "project")
        with (
            Tracker(tmp_path, "run", sinks=[sink]) as tracker,
            tracker.stage("s", "rl", 0, 1, resumed=resumed) as stage,
        ):
            stage.log(2, {"loss": 0.5}, {"train": 1.0})
            stage.rollouts(2, [record()])
            stage.metrics({"eval.think.accuracy": 0.5}, [record()])
            stage.artifact({"path": "model", "digest": "abc", "parent": "xyz"})
    identity = (tmp_path / "wandb_id").read_text().strip()
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    # two processes within one second share a folder name; the id is what matters
    assert files
    assert all(file.stat().st_size > 0 for file in files)
    assert {file.name for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")} == {f"run-{identity}.wandb"}
    after = psutil.Process().children(recursive=True)
    assert [process.name() for process in after if process.pid not in before] == []


def test_record_image_keeps_small_pngs_and_shrinks_large_ones():
    import base64

    small = png((16, 8))
    assert base64.b64decode(record_image(small, (16, 8)).partition(",")[2]) == small
    large = record_image(png((1000, 500)), (1000, 500))
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as image:
        assert image.size == (384, 192)


def test_headline_shows_the_few_numbers_worth_a_glance():
    metrics = {"tokens": 9.0, "eval.think.accuracy": 0.875, "loss": 0.51234, "reward.mean": 0.5, "reward.format": 1.0}
    assert headline(metrics) == "loss 0.512 · reward.mean 0.5 · think.accuracy 0.875"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.6, "4 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
