import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from rlhf.report import ReportError, write
from rlhf.report.charts import Axis, Series, _ticks, lanes, line_chart, number, percent, smooth
from rlhf.report.page import _quality
from rlhf.report.run import StageView, read
from rlhf.report.samples import card, followed, is_right, split
from tests.unit.synthetic_run import STAGES, rollout, write_lines, write_run

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Tags(HTMLParser):
    """Every opened tag with its attributes; fails on a tag closed out of order."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def page_of(folder: Path) -> str:
    return write(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "think-fusion-digits")


def test_the_page_tells_the_run_with_its_numbers(full):
    page = page_of(full)
    tags = Tags(page)
    assert {"curriculum", "accuracy", "watch", "curves", "trust", "time", "stages", "lineage", "samples"} <= tags.ids()
    text = re.sub(r"<[^>]+>", "", page).replace("\u00a0", " ")
    assert "it was right 9 % of the time after instruct and 88 % after rl-mixed" in text
    assert "passed all 7 of its quality gates" in text
    assert "0.9 – 1.088%97.0%" in text  # how often the judge is right where it is sure
    assert "88 % 85 to 91" in text
    for name, *_ in STAGES:
        assert name in text


def test_the_page_loads_nothing(full):
    tags = Tags(page_of(full)).tags
    sources = [value for _, attributes in tags for key, value in attributes.items() if key in {"src", "href"}]
    assert len(sources) > 50
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert "url(" not in page_of(full)
    assert all(attributes["alt"] for tag, attributes in tags if tag == "img")
    assert all("aria-label" in attributes or "aria-hidden" in attributes for tag, attributes in tags if tag == "svg")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; apt-get install chromium")
@pytest.mark.timeout(120)
def test_a_browser_opens_it_without_a_complaint(full, tmp_path):
    path = write(full)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    dom = Tags(done.stdout)
    assert {"theme", "watch0", "samples"} <= dom.ids()
    classes = [attributes.get("class") or "" for _, attributes in dom.tags]
    assert sum("chart" in value.split() for value in classes) >= 12
    assert sum(value.startswith("sample ") for value in classes) >= 9


def test_what_the_model_wrote_is_never_markup(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "stages" / "13-rl-mixed"
    bad = "<script>alert(1)</script>"
    hostile = rollout("a/1", [1, 2], 'x" onerror="alert(1)', True, True, True) | {
        "completion": f"<think>{bad}</think>\\boxed{{{bad}}}", "question": bad, "answer": bad, "verdict": bad,
        "note": bad, "parts": {bad: 1.0}, "outcome": bad,
    }  # fmt: skip
    write_lines(path / "rollouts.jsonl", [{"step": bad} | hostile])
    evaluation = json.loads((path / "eval.json").read_text())
    evaluation["examples"] = [hostile | {"key": "heldout/0", "outcome": "scored"}]
    (path / "eval.json").write_text(json.dumps(evaluation))
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"][0] |= {"kind": bad, "status": bad}
    summary["machine"] = {bad: bad}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert bad not in page
    assert page.count("&lt;script&gt;") > 8
    assert page.count("<script>") == 1
    assert not any(key.startswith("on") for _, attributes in Tags(page).tags for key in attributes)
    assert "the image of this sample cannot be read" in page


def test_the_headline_follows_the_policy_not_what_stands_beside_it(tmp_path):
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    line = [stage.name for stage in read(folder).line]
    assert line[-1] == "rl-mixed"
    assert "judge" not in line
    # an ablation that starts where the last stage started, run after it
    last = next(stage for stage in summary["stages"] if stage["name"] == "rl-mixed")
    ablation = json.loads(json.dumps(last))
    ablation["name"] = "rl-answer-only"
    ablation["artifact"]["digest"] = "other"
    ablation["metrics"]["eval.think.accuracy"] = 0.123
    summary["stages"].append(ablation)
    (folder / "summary.json").write_text(json.dumps(summary))
    assert [stage.name for stage in read(folder).line] == line
    assert "after <em>rl-mixed</em>" in page_of(folder)


def test_a_failed_gate_is_said_first(tmp_path):
    page = page_of(write_run(tmp_path / "run", 8, failed=True))
    assert "It stopped at <em>rl-verifiable</em>: eval.think.accuracy 0.79, wanted ≥ 0.97" in page
    assert 'class="pill failed"' in page
    assert 'class="pending"' in page
    Tags(page)


def test_a_running_run_shows_what_is_there(tmp_path):
    folder = write_run(tmp_path / "run", 8, running=True)
    with (folder / "stages" / "08-rl-verifiable" / "steps.jsonl").open("a") as file:
        file.write('{"step": 31, "met')
    states = [stage.state for stage in read(folder).stages]
    assert states == ["done"] * 7 + ["running"] + ["pending"] * 5
    assert "It is now at <em>rl-verifiable</em>, 7 of 13 stages are done." in page_of(folder)


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        ("interrupted", "", "It was interrupted at <em>rl-verifiable</em>.</strong> 7 of 13 stages are done"),
        (
            "preempted",
            "SIGTERM",
            "It was preempted at <em>rl-verifiable</em>: SIGTERM.</strong> 7 of 13 stages are done",
        ),
        (
            "failed",
            "RuntimeError: no <space>",
            "An error ended it at <em>rl-verifiable</em>: RuntimeError: no &lt;space&gt;.",
        ),
    ],
)
def test_a_run_that_was_ended_is_not_in_progress(tmp_path, status, error, told):
    folder = write_run(tmp_path / "run", 8, running=True)
    (folder / "summary.json").write_text(json.dumps({"name": "run", "status": status, "error": error}))
    page = page_of(folder)
    assert told in page
    assert "in progress" not in page
    assert [stage.state for stage in read(folder).stages][6:9] == ["done", "stopped", "pending"]
    Tags(page)


def test_stages_of_another_recipe_are_not_told(tmp_path):
    """The recipe has lost a stage since: its folder stays, and those after it have numbers of before."""
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"] = [stage for stage in summary["stages"] if stage["name"] != "judge"]
    (folder / "summary.json").write_text(json.dumps(summary))
    recipe = (folder / "recipe.toml").read_text()
    start = recipe.index('[[stages]]\nname = "judge"')
    end = recipe.index("[[stages]]", start + 1)
    (folder / "recipe.toml").write_text(recipe[:start] + recipe[end:])
    shutil.move(folder / "stages" / "09-judge", folder / "stages" / "14-judge")
    assert len(read(folder).stages) == 12
    assert "judge" not in [stage.name for stage in read(folder).stages]


def test_what_an_earlier_run_made_is_not_done_again_yet(tmp_path):
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"] = summary["stages"][:4]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert [stage.state for stage in read(folder).stages] == ["done"] * 4 + ["pending"] * 9
    page = page_of(folder)
    assert "from before" in page
    assert "rl-mixed</em>" not in page  # nothing is told of what it can do


@pytest.mark.parametrize("missing", ["summary.json", "recipe.toml", "stages"])
def test_any_file_may_be_missing(tmp_path, missing):
    folder = write_run(tmp_path / "run")
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(folder)
    assert "rl-mixed" in page
    Tags(page)


def test_a_single_stage_is_a_run(tmp_path):
    folder = tmp_path / "alone"
    stage = folder / "stages" / "01-sft"
    stage.mkdir(parents=True)
    write_lines(stage / "steps.jsonl", [{"step": 1, "seconds": {"train": 1.0}, "metrics": {"loss": 2.0, "x": None}}])
    page = page_of(folder)
    assert "in a single lesson" in page
    assert "alone" in page
    Tags(page)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ReportError, match="give the folder of a run"):
        write(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ReportError, match=r"summary\.json: not valid JSON"):
        write(tmp_path)
    (tmp_path / "summary.json").unlink()
    stage = tmp_path / "stages" / "01-a"
    stage.mkdir(parents=True)
    (stage / "steps.jsonl").write_text('{"step": 1}\n7\n{"step": 3}\n')
    with pytest.raises(ReportError, match=r"steps\.jsonl:2"):
        write(tmp_path)


def test_followed_questions_go_from_wrong_to_right(full):
    key, trail = followed(read(full).stages)[0]
    assert "#" not in key
    assert [stage.name for stage, _ in trail] == [name for name, *_, think, _ in STAGES if think is not None]
    assert is_right(trail[0][1][0]) is False
    assert is_right(trail[-1][1][0]) is True
    assert all(records[0]["think"] and not records[1]["think"] for _, records in trail)


def test_a_judges_verdict_is_right_when_it_is_what_it_should_be():
    def record(verdict, answer):
        return {"parts": {"judge": verdict}, "answer": answer, "completion": "3 ok. no", "verdict": verdict}

    assert [is_right(record(v, a)) for v, a in ((1.0, "yes"), (0.0, "no"), (1.0, "no"), (0.0, "yes"))] == [
        *(True, True, False, False)
    ]
    assert "no box" not in card(record(0.0, "no"))
    rollout = {"parts": {"answer": 0.0, "think": 0.0}, "answer": "3", "completion": "\\boxed{4}", "verdict": 0.0}
    assert "not sound" in card(rollout)
    assert "not sound" not in card(rollout | {"note": "think: not judged: not the right answer"})


def test_what_was_measured_beside_accuracy_stands_in_a_table(tmp_path):
    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    stage = next(stage for stage in summary["stages"] if stage["name"] == "rl-mixed")
    stage["metrics"] |= {"eval.think.soundness": 0.557, "eval.think.pass@4": 0.812}
    stage["metrics"] |= {"eval.think.gain": 0.036, "eval.think.gain.low": -0.017, "eval.think.gain.high": 0.056}
    (run / "summary.json").write_text(json.dumps(summary))
    page = write(run).read_text()
    for shown in ("whole chain sound", percent(0.557), "one of 4 right", percent(0.812), "+3.6", "-2 to +6"):
        assert shown in page
    assert "right, but chain unsound" not in page  # nobody measured it


def test_reading_a_completion():
    assert split("<think> a b </think> \\boxed{3}") == ("a b", "\\boxed{3}")
    assert split("<think> never closed") == ("never closed", "")
    assert split("plain") == ("", "plain")
    assert is_right({"completion": "<think>\\boxed{4}</think>\\boxed{3}", "answer": 3}) is True
    assert is_right({"completion": "\\boxed{4}", "answer": "3"}) is False
    assert is_right({"completion": "\\boxed{3}", "answer": "3", "outcome": "timed_out"}) is None


@pytest.mark.parametrize("bounds", [(0, 1), (0.5, 0.97), (-3, 17), (1e-7, 3e-7), (0, 12345), (119, 121)])
def test_ticks_are_round_and_inside(bounds):
    low, high = bounds
    ticks = _ticks(low, high, 4)
    assert 2 <= len(ticks) <= 6
    assert low - 1e-9 * (high - low) <= ticks[0] < ticks[-1] <= high + 1e-9 * (high - low)
    gaps = {f"{b - a:.3e}" for a, b in pairwise(ticks)}
    assert len(gaps) == 1
    assert float(gaps.pop().partition("e")[0]) in {1, 2, 2.5, 5}


def test_a_line_is_drawn_where_its_values_are():
    axis = Axis("share", percent, 0.0, 1.0)
    drawn = line_chart([Series("a", "main", [(0, 0.0), (10, 1.0), (20, 0.5)])], axis, summary="s", size=(264, 164))
    points = re.search(r'<polyline class="line solid tone-main" points="([^"]+)"', drawn).group(1)
    # 264 − 50 left − 14 right = 200 wide; 164 − 24 top − 40 bottom = 100 high
    assert points == "50.0,124.0 150.0,24.0 250.0,74.0"


def test_logarithmic_axis_spaces_decades_evenly():
    points = [(0, 1e-6), (1, 1e-5), (2, 1e-4)]
    drawn = line_chart([Series("a", "main", points)], Axis("nats", number, log=True), summary="s", size=(264, 164))
    heights = [
        float(pair.split(",")[1]) for pair in re.search(r'solid tone-main" points="([^"]+)"', drawn).group(1).split()
    ]
    assert heights == [124.0, 74.0, 24.0]
    assert all(tick in drawn for tick in ("10⁻⁶", "10⁻⁵", "10⁻⁴"))


def test_smooth_is_a_centred_mean():
    points = [(float(step), math.sin(step)) for step in range(100)]
    reach = 100 // 24
    for index, (step, value) in enumerate(smooth(points)):
        near = [v for s, v in points if abs(s - step) <= reach]
        assert step == points[index][0]
        assert value == pytest.approx(sum(near) / len(near))


def test_the_trunk_of_a_lineage_stays_straight():
    #          0 ─ 1 ─ 3 ─ 5      2 and 4 are side branches, 2 is over before 4 begins
    drawn, _ = lanes([None, 0, 0, 1, 1, 3], ["main"] * 6)
    columns = [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', drawn)]
    assert columns[0] == columns[1] == columns[3] == columns[5]
    assert columns[2] > columns[0]
    assert columns[4] > columns[0]


def test_numbers_as_people_read_them():
    assert percent(0.875) == "88\u00a0%"
    assert percent(0.004) == "0.4\u00a0%"
    assert number(8.6e-6) == "8.6×10⁻⁶"
    assert number(1e-5) == "10⁻⁵"
    assert number(0.0) == "0"
    assert number(0.12345) == "0.123"
    assert number(-2e-5) == "-2×10⁻⁵"


def test_when_a_model_thinks_is_shown_where_it_chooses() -> None:
    def shown(easy: float) -> str:
        rates = {f"eval.think.think_rate.{kind}": rate for kind, rate in (("easy", easy), ("<hard>", 0.99))}
        return _quality([StageView(1, "rl", "rl", "done", "done", metrics={"eval.think.accuracy": 0.9, **rates})])

    assert "thinks: easy" in shown(0.007)
    assert "<td>0.7\N{NO-BREAK SPACE}%</td>" in shown(0.007)
    assert "thinks: &lt;hard&gt;" in shown(0.007)
    assert "thinks: easy" not in shown(1.0)
