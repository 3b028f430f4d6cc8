"""The command line: one verb, recipe files, overrides.

    rlhf run recipes/think_fusion_digits.toml recipes/sizes/smoke.toml -o 'stages.long-cot.lr = 1e-4'

Exit status: 0 done, 1 the run failed, 2 the recipe or the data cannot be used, 3 a gate was missed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.plan import Plan, PlanError, describe, make_plan, read_verdicts
from rlhf.recipe import Recipe, RecipeError, load

FAILED, UNUSABLE, GATE_MISSED, INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.command(parsed)
        return status
    except (RecipeError, PlanError) as error:
        return _fail(error, UNUSABLE)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues from the last checkpoint", INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlhf", description=(__doc__ or "").strip(), formatter_class=_Plain)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, command: object, about: str, recipe: bool = True) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=about, description=about)
        added.set_defaults(command=command)
        if recipe:
            added.add_argument("recipe", nargs="+", help="recipe files; later ones change earlier ones")
            added.add_argument("-o", "--override", action="append", default=[], metavar="TOML", help="'a.b = 1'")
            added.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders lie (default: runs)")
        return added

    run = verb("run", run_command, "run a curriculum, or continue it where it stood")
    run.add_argument("--address", help="a running Ray cluster to join (default: start one for this job)")
    verb("plan", plan_command, "show and check what a recipe would do, without starting anything")
    verb("check", check_command, "measure what only an engine can tell: implementation and log-prob gap of [model]")
    evaluate = verb("eval", eval_command, "evaluate a model folder on the recipe's held-out questions")
    evaluate.add_argument("--model", type=Path, required=True, help="an artifact folder")
    report = verb("report", report_command, "write report.html of a run folder", recipe=False)
    report.add_argument("folder", type=Path)
    submit = verb("submit", submit_command, "run a curriculum as a job of a Ray head (started here if none is given)")
    submit.add_argument("--address", help="http://HOST:PORT of the head's dashboard")
    for name, command, about in (
        ("status", status_command, "the state of a submitted job"),
        ("logs", logs_command, "what a submitted job printed"),
        ("stop", stop_command, "stop a submitted job"),
    ):
        job = verb(name, command, about, recipe=False)
        job.add_argument("job")
        job.add_argument("--address")
        job.add_argument("--runs", type=Path, default=Path("runs"))
    return parser


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


def run_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override)
    plan = make_plan(recipe, verdicts=read_verdicts(parsed.runs / "verdicts.json"))
    folder = parsed.runs / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        return asyncio.run(_run(recipe, plan, folder, parsed.address))


async def _run(recipe: Recipe, plan: Plan, folder: Path, address: str | None) -> int:
    import tomli_w

    _private_ray(folder)
    from actors.launch import launch
    from rlhf.checkpoint import CheckpointError
    from rlhf.curriculum import Curriculum, GateError
    from rlhf.data.rows import DataError
    from rlhf.footprint import Footprint
    from rlhf.tracking import Tracker

    _stop_on_signals()
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    try:
        with Footprint() as footprint, Tracker(folder, recipe.name, recipe.tracking) as tracker:
            curriculum = Curriculum(recipe, folder, tracker, footprint)
            # rows are made while the actors start
            preparing = asyncio.create_task(asyncio.to_thread(curriculum.prepare))
            try:
                async with launch(recipe, plan, address) as actors:
                    await preparing
                    await curriculum.run(actors)
            finally:
                _report(folder)
        return 0
    except GateError as error:
        return _fail(error, GATE_MISSED)
    except DataError as error:
        return _fail(error, UNUSABLE)
    except asyncio.CancelledError:
        return _fail("interrupted; the same command continues from the last checkpoint", INTERRUPTED)
    except (CheckpointError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        return _fail(f"{type(error).__name__}: {error}\nthe same command continues from the last checkpoint", FAILED)


def _report(folder: Path) -> None:
    """Write the page. It is a view: what goes wrong in it is said, and changes nothing of how the run ended."""
    from rlhf import report

    try:
        print(f"report: {report.write(folder)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        _fail(f"{folder}: its report could not be written: {type(error).__name__}: {error}", FAILED)


def plan_command(parsed: argparse.Namespace) -> int:
    verdicts = read_verdicts(parsed.runs / "verdicts.json")
    print(describe(make_plan(load(parsed.recipe, parsed.override), verdicts=verdicts)))
    return 0


def check_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override)
    folder = parsed.runs / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    _private_ray(folder)
    from actors.check import check

    verdicts = asyncio.run(check(recipe, folder))
    for verdict in verdicts:
        print(f"{verdict.implementation}: {verdict}")
    return 0 if any(verdict.proven for verdict in verdicts) else FAILED


def eval_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override)
    evaluate = {
        "name": f"{recipe.name}-eval",
        "model": {"path": str(parsed.model)},
        "stages": [{"name": "evaluate", "kind": "evaluate", "evaluate": "modes"}],
    }
    from rlhf.recipe import validate

    table = recipe.model_dump(mode="json", exclude_none=True) | evaluate
    narrowed = validate(table, " + ".join(parsed.recipe))
    folder = parsed.runs / narrowed.name
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(narrowed, verdicts=read_verdicts(parsed.runs / "verdicts.json"))
    with _locked(folder):
        return asyncio.run(_run(narrowed, plan, folder, None))


def report_command(parsed: argparse.Namespace) -> int:
    from rlhf import report

    if not parsed.folder.is_dir():
        return _fail(f"{parsed.folder}: no such run folder; `rlhf run` makes runs/NAME", UNUSABLE)
    print(report.write(parsed.folder))
    return 0


def submit_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override)
    make_plan(recipe, verdicts=read_verdicts(parsed.runs / "verdicts.json"))
    return _job("submit", recipe, parsed.recipe, parsed.override, parsed.runs, parsed.address)


def status_command(parsed: argparse.Namespace) -> int:
    return _job("status", parsed.job, parsed.runs, parsed.address)


def logs_command(parsed: argparse.Namespace) -> int:
    return _job("logs", parsed.job, parsed.runs, parsed.address)


def stop_command(parsed: argparse.Namespace) -> int:
    return _job("stop", parsed.job, parsed.runs, parsed.address)


def _job(verb: str, *arguments: object) -> int:
    """Call a verb of `actors.jobs` and print its answer."""
    from actors import jobs

    try:
        print(getattr(jobs, verb)(*arguments))
    except jobs.JobError as error:
        return _fail(error, FAILED)
    return 0


def _locked(folder: Path):  # type: ignore[no-untyped-def]
    """Hold the run folder: two drivers in one folder would overwrite each other's stages."""
    import contextlib
    import fcntl

    @contextlib.contextmanager
    def hold():  # type: ignore[no-untyped-def]
        with (folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RecipeError(
                    f"{folder}: another `rlhf run` is using this run folder; stop it, or give the recipe another name"
                ) from None
            yield

    return hold()


def _private_ray(folder: Path) -> None:
    """Token, loopback, no usage statistics: Ray reads its environment when it is imported."""
    from actors.security import ray_environment

    os.environ.update(ray_environment(folder))


def _stop_on_signals() -> None:
    """SIGINT and SIGTERM cancel the run, so that every context is left and every process ended."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)


def _fail(error: object, status: int) -> int:
    print(f"rlhf: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
