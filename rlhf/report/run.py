"""A run folder, read leniently: any file may be missing, none may be broken."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "failed", "running", "stopped", "pending"]
Record = Mapping[str, Any]

KINDS = {
    "sft": "learns from worked examples",
    "preference": "learns which of two answers is better",
    "reward_model": "learns to score answers as people would",
    "rl": "practises and is rewarded",
    "rebuild": "gets other eyes or parts, and keeps what it knows",
    "merge": "becomes the average of several of its kind",
    "synthesize": "makes its own training data",
    "evaluate": "sits an exam",
}
ENDS = {"failed": "An error ended it", "interrupted": "It was interrupted", "preempted": "It was preempted"}
_DONE = {"done", "passed", "ok", "finished", "complete", "completed", "reused", "skipped"}


class ReportError(ValueError):
    """A run folder that cannot be shown; the message names the file and what to do."""


@dataclass(frozen=True)
class StageView:
    """One stage, with whatever is known of it. number counts from 1; word is its status as the run calls it."""

    number: int
    name: str
    kind: str
    state: State
    word: str
    seconds: float | None = None
    gates: tuple[Record, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifact: Record = field(default_factory=dict)
    steps: tuple[Record, ...] = ()
    rollouts: tuple[Record, ...] = ()
    examples: tuple[Record, ...] = ()
    measured_on: str = ""

    @property
    def family(self) -> str:
        """The kind if the page knows it, else "stage": safe inside a class name."""
        return self.kind if self.kind in KINDS else "stage"

    def metric(self, name: str) -> float | None:
        value = self.metrics.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def curve(self, name: str, table: str = "metrics") -> list[tuple[float, float]]:
        """(step, value) of a step metric, without the steps that lack it."""
        found = ((line["step"], line.get(table, {}).get(name)) for line in self.steps)
        return [(float(step), float(value)) for step, value in found if isinstance(value, (int, float))]

    def step_names(self, table: str = "metrics") -> list[str]:
        names: dict[str, None] = {}
        for line in self.steps:
            names |= dict.fromkeys(line.get(table, {}))
        return list(names)


@dataclass(frozen=True)
class RunView:
    name: str
    description: str
    seed: int | None
    wall_seconds: float | None
    budget_minutes: float | None
    peak_rss_gib: float | None
    stages: tuple[StageView, ...]
    machine: Record
    versions: Record
    ended: str = ""  # how the last process of it ended, where it could say so: "done" or one of ENDS
    error: str = ""

    @property
    def state(self) -> State:
        states = {stage.state for stage in self.stages}
        if "failed" in states or self.ended == "failed":
            return "failed"
        if states == {"done"}:
            return "done"
        return "stopped" if self.ended in ENDS else "running"

    @property
    def line(self) -> tuple[StageView, ...]:
        """The stages that made the policy, each continuing the one before: the longest such line, of equals the first.
        Judges, ablations and second measurements stand beside it. All stages where no lineage is known."""
        makers = {str(stage.artifact["digest"]): stage for stage in self.stages if stage.artifact.get("digest")}

        def line_to(stage: StageView) -> tuple[StageView, ...]:
            parent = makers.get(str(stage.artifact.get("parent")))
            # a stage that changes nothing has its parent's digest
            return (*(line_to(parent) if parent is not None and parent.number < stage.number else ()), stage)

        trained = [stage for stage in makers.values() if stage.kind in ("sft", "preference", "rl", "rebuild", "merge")]
        return max(map(line_to, trained), key=len, default=self.stages)


def read(run_folder: Path) -> RunView:
    """Read a run folder. Raises ReportError naming the file that is broken, or the folder if it holds no run."""
    summary = _json(run_folder / "summary.json")
    recipe = _toml(run_folder / "recipe.toml")
    folders = sorted(path for path in (run_folder / "stages").glob("[0-9]*-*") if path.is_dir())
    if not (summary or recipe or folders):
        raise ReportError(f"{run_folder}: no recipe.toml, summary.json or stages/ here; give the folder of a run")
    declared = {str(stage["name"]): stage for stage in recipe.get("stages", [])}
    finished = {str(stage["name"]): stage for stage in summary.get("stages", [])}
    # a recipe that has changed since leaves folders of stages that are no longer in it, or stand elsewhere
    places = {name: f"{number:02d}-{name}" for number, name in enumerate(declared, 1)}
    started = {
        name: path
        for path in folders
        if (name := path.name.partition("-")[2]) not in places or places[name] == path.name
    }
    names = list(dict.fromkeys([*declared, *finished, *(() if declared else started)]))
    ended = str(summary.get("status") or "")
    return RunView(
        name=str(summary.get("name") or recipe.get("name") or run_folder.resolve().name),
        description=str(recipe.get("description", "")),
        seed=summary.get("seed", recipe.get("seed")),
        wall_seconds=summary.get("wall_seconds"),
        budget_minutes=recipe.get("budget_minutes"),
        peak_rss_gib=summary.get("peak_rss_gib"),
        stages=tuple(
            _stage(number, name, declared.get(name, {}), finished.get(name), started.get(name), bool(finished), ended)
            for number, name in enumerate(names, 1)
        ),
        machine=summary.get("machine") or {},
        versions=summary.get("versions") or {},
        ended=ended,
        error=str(summary.get("error") or ""),
    )


def _stage(
    number: int,
    name: str,
    declared: Record,
    finished: Record | None,
    folder: Path | None,
    counted: bool,
    ended: str,
) -> StageView:
    """`counted`: the summary says which stages are done; what one that is not among them made is of an earlier run, and
    not told. `ended`: how the run did, where it has."""
    manifest = _json(folder / "manifest.json") if folder else {}
    before = counted and finished is None and bool(manifest)
    if before:
        folder, manifest = None, {}
    evaluation = _json(folder / "eval.json") if folder else {}
    found = finished or {}
    steps = tuple(_jsonl(folder / "steps.jsonl")) if folder else ()
    gates = tuple(found.get("gates") or ())
    now = "stopped" if ended in ENDS else "in progress"
    word = "from before" if before else "done" if manifest else now if folder else "not started"
    word = str(found.get("status") or word)
    return StageView(
        number=number,
        name=name,
        kind=str(found.get("kind") or declared.get("kind") or "stage"),
        state=_state(word, gates, folder is not None),
        word=word,
        seconds=found.get("seconds") or sum(sum(_numbers(line.get("seconds"))) for line in steps) or None,
        gates=gates,
        metrics={**(evaluation.get("metrics") or {}), **(found.get("metrics") or {})},
        artifact=found.get("artifact") or manifest,
        steps=steps,
        rollouts=tuple(_jsonl(folder / "rollouts.jsonl")) if folder else (),
        examples=tuple(evaluation.get("examples") or ()),
        measured_on=str(declared.get("eval_data") or ""),
    )


def _state(word: str, gates: tuple[Record, ...], started: bool) -> State:
    if "fail" in word or "error" in word or any(gate.get("passed") is False for gate in gates):
        return "failed"
    if word in _DONE:
        return "done"
    if word == "stopped":
        return "stopped"
    return "running" if started or word == "running" else "pending"


def _numbers(table: Any) -> list[float]:
    return [float(value) for value in (table or {}).values() if isinstance(value, (int, float))]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); repair it or remove it, then write the report") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: holds no object; repair it or remove it, then write the report")
    return value


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    # what follows the last newline is still being written, or was cut by a kill
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ReportError(f"{path}:{number}: not valid JSON; remove that line, then write the report") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ReportError(f"{path}:{number}: not a record with a step; remove that line, then write the report")
        records.append(record)
    return records


def _toml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ReportError(f"{path}: not valid TOML ({error}); repair it, then write the report") from error
