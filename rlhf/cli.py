"""The command line, where everything is put together: one verb, recipe files, overrides."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from rlhf.plan import VERDICTS, Cluster, Plan, PlanError, Verdict, check, describe, make_plan, read_verdicts
from rlhf.preemption import REQUEUE, PreemptedError, Preemption
from rlhf.recipe import Recipe, RecipeError, load

ABOUT = """Post-training of vision-language models: a recipe is a curriculum, a run works through it.

    rlhf run recipes/think_fusion_digits.toml recipes/sizes/smoke.toml -o 'stages.long-cot.lr = 1e-4'

Exit status: 0 done, 1 the run failed, 2 the recipe or the data cannot be used, 3 a gate was missed, 130 interrupted,
75 preempted: SIGTERM, SIGUSR1 or a drained node asked it to stop; the same command continues from a checkpoint of the
step it was in, if that ended within cluster.grace_seconds. SIGTERM again, or SIGINT, waits for no step.
"""
BRIDGES = Path("recipes/bridges")
PIPED_WIDTH = 240  # columns of a table that no terminal shows
FAILED, UNUSABLE, GATE_MISSED, INTERRUPTED = 1, 2, 3, 130
CONTINUES = "the same command continues from the last checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.command(parsed)
        return status
    except (RecipeError, PlanError) as error:
        return _fail(error, UNUSABLE)
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail(f"interrupted; {CONTINUES}", INTERRUPTED)


def _unread() -> bool:
    """Whether the reader of what is printed has seen enough, and gone."""
    printed = select.poll()
    printed.register(sys.stdout, 0)  # errors are told unasked
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in printed.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlhf", description=ABOUT, formatter_class=_Plain)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('thinkfusion')}")
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
    planned = verb("plan", plan_command, "show and check what a recipe would do, without starting anything")
    planned.add_argument(
        "--cluster", type=Path, metavar="SITE", help="a file with [cluster] nodes (default: this machine)"
    )
    verb("check", check_command, "measure what only an engine can tell: implementation and log-prob gap of [model]")
    evaluate = verb("eval", eval_command, "evaluate a model folder on the recipe's held-out questions")
    evaluate.add_argument("--model", type=Path, required=True, help="an artifact folder")
    bridges = verb("bridges", bridges_command, "list published bridges: size, tokens, stages, serving", recipe=False)
    bridges.add_argument("recipe", nargs="*", type=Path, help="recipe files (default: all of recipes/bridges)")
    bridges.add_argument("--size", default="1024x768", metavar="WIDTHxHEIGHT", help="of the picture whose tokens count")
    bridges.add_argument("--markdown", action="store_true", help="as the table of recipes/bridges/README.md")
    draw = verb("draw", draw_command, "draw what a model's answer signals, by a diffusion model", recipe=False)
    draw.add_argument("model", type=Path, help="an artifact whose head reads signals")
    draw.add_argument("question", help="what to ask it")
    draw.add_argument("--image", type=Path, action="append", default=[], help="a picture beside the question")
    draw.add_argument("--generator", required=True, help="folder or hub name of a Stable Diffusion pipeline")
    draw.add_argument("--out", type=Path, default=Path("pictures"), help="where they are written (default: pictures)")
    draw.add_argument("--steps", type=int, default=50, help="of denoising (default: 50)")
    draw.add_argument("--seed", type=int, default=0)
    reward = verbs.add_parser(
        "reward", help="try a reward function, or begin one", description="Rewards by themselves."
    )
    tried = reward.add_subparsers(required=True, metavar="test | new")
    test = tried.add_parser("test", help="what it gives, how long it takes, what it fails on, what fools it")
    test.set_defaults(command=reward_test_command)
    test.add_argument("function", help='"module:function", "path/file.py:function" or "recipe.toml:judges.NAME"')
    source = test.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="ROWS", help="parquet or JSONL: prompt, completion, any columns")
    source.add_argument("--rollouts", type=Path, metavar="RUN", help="what a run kept of its rollouts: runs/NAME")
    test.add_argument(
        "--option", action="append", default=[], metavar="TOML", help="an argument of it: 'tolerance = 0.1'"
    )
    beside = test.add_mutually_exclusive_group()
    beside.add_argument("--against", metavar="FUNCTION", help="another reward to compare with")
    beside.add_argument("--truth", metavar="COLUMN", help="a column of numbers to compare with")
    test.add_argument("--deadline", type=float, default=30.0, help="seconds a call may take (default: 30)")
    test.add_argument("--minutes", type=float, default=10.0, help="all of it may take (default: 10)")
    test.add_argument("--json", type=Path, help="where to write counts, values and seconds")
    test.add_argument("--html", type=Path, help="where to write all of it as a page")
    new = tried.add_parser("new", help="write a commented reward and its test to start from")
    new.set_defaults(command=reward_new_command)
    new.add_argument("name", help="of the function and of its file, NAME.py")
    report = verb("report", report_command, "write report.html of a run folder", recipe=False)
    report.add_argument("folder", type=Path)
    submit = verb(
        "submit", submit_command, "run a curriculum as a job of a cluster: [cluster], or a Ray head started here"
    )
    submit.add_argument("--to", choices=["ray", "kuberay", "slurm"], help="where it goes (default: cluster.to)")
    submit.add_argument("--cluster", type=Path, metavar="FILE", help="a site's [cluster], laid over the recipe")
    submit.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be submitted, and submit nothing"
    )
    submit.add_argument("--address", help="http://HOST:PORT of a Ray head's dashboard (cluster.ray.address)")
    submit.add_argument("--port", type=int, help="of the Ray head to start where there is none (default: Ray's)")
    jobs = [
        verb("status", status_command, "the state of a submitted job", recipe=False),
        (logs := verb("logs", logs_command, "what a submitted job printed", recipe=False)),
        verb("stop", stop_command, "stop a submitted job, with time for a checkpoint", recipe=False),
        (again := verb("resubmit", resubmit_command, "submit a job again: it continues where it stood", recipe=False)),
    ]
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    again.add_argument("--port", type=int, help="of the Ray head to start where there is none (default: Ray's)")
    for job in jobs:
        job.add_argument("job", help="its name: `rlhf submit` printed it, `rlhf list` knows it")
    for listed in (*jobs, verb("list", list_command, "every job submitted from here, and its state", recipe=False)):
        listed.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders lie (default: runs)")
    return parser


def _verdicts(parsed: argparse.Namespace) -> tuple[Verdict, ...]:
    """What `rlhf check` kept beside the run folders."""
    return read_verdicts(parsed.runs / VERDICTS)


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


def run_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override)
    if parsed.address is None:
        plan, folder = make_plan(recipe, verdicts=_verdicts(parsed)), _folder(parsed, recipe)
    else:
        check(recipe)
        folder = _folder(parsed, recipe)
        _private_ray(folder, join=True)
        from actors.launch import cluster_of

        try:
            cluster = cluster_of(parsed.address)
        except (ConnectionError, ValueError, RuntimeError) as error:
            return _fail(f"--address {parsed.address}: no Ray cluster can be joined there: {error}", UNUSABLE)
        plan = make_plan(recipe, cluster, _verdicts(parsed))
    join = parsed.address is not None
    return _carried_out(
        lambda notice: _run(recipe, plan, folder, parsed.address, notice), recipe, folder, CONTINUES, join
    )


async def _run(recipe: Recipe, plan: Plan, folder: Path, address: str | None, preemption: Preemption) -> None:
    import tomli_w

    from actors.launch import launch
    from rlhf.curriculum import Curriculum
    from rlhf.footprint import Footprint
    from rlhf.tracking import Tracker

    handed_over = {"cluster": {"ray", "kuberay", "slurm"}}  # and an environment may hold keys
    written = recipe.model_dump(mode="json", exclude_none=True, exclude=handed_over)
    (folder / "recipe.toml").write_text(tomli_w.dumps(written))
    try:
        with Footprint() as footprint, Tracker(folder, recipe.name, recipe.tracking) as tracker:
            curriculum = Curriculum(recipe, folder, tracker, footprint, preemption=preemption)
            # rows are made while the actors start
            preparing = asyncio.create_task(asyncio.to_thread(curriculum.prepare))
            try:
                async with launch(recipe, plan, address, preemption) as actors:
                    await preparing
                    await curriculum.run(actors)
            finally:  # what is wrong with the rows is to be known, too, where the actors did not start
                await asyncio.gather(preparing)
    finally:
        _report(folder)


def _folder(parsed: argparse.Namespace, recipe: Recipe) -> Path:
    folder: Path = parsed.runs.absolute() / recipe.name  # actors may stand elsewhere
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"--runs {parsed.runs}: {folder} cannot be made ({error.strerror}); choose another folder with --runs"
        ) from error
    return folder


def _carried_out(
    run: Callable[[Preemption], Awaitable[None]], recipe: Recipe, folder: Path, again: str, join: bool = False
) -> int:
    """The exit status of `run`, which has `folder` to itself; `again`: what the same command does next time; `join`: a
    Ray cluster that runs already."""
    from actors.security import job_stop_seconds

    def leave() -> None:
        _fail(f"{preemption.cancelled}; it took too long to leave, so its processes end by themselves; {again}", 0)
        os._exit(REQUEUE)

    with _locked(folder), Preemption(min(recipe.cluster.grace_seconds, job_stop_seconds()), leave) as preemption:
        temporary = _private_ray(folder, join)
        status = asyncio.run(_explained(run, again, preemption))
        if temporary is not None and status == 0:  # else what Ray's processes said is kept
            shutil.rmtree(temporary, ignore_errors=True)
        return status


async def _explained(run: Callable[[Preemption], Awaitable[None]], again: str, preemption: Preemption) -> int:
    """The exit status of a run, its errors in words."""
    from rlhf.checkpoint import CheckpointError
    from rlhf.data.rows import DataError
    from rlhf.stage import GateError

    _stop_on_signals(preemption)
    try:
        await run(preemption)
        return 0
    except GateError as error:
        return _fail(error, GATE_MISSED)
    except DataError as error:
        return _fail(error, UNUSABLE)
    except PreemptedError as error:
        return _fail(f"{error}; {again}", REQUEUE)
    except asyncio.CancelledError:
        if preemption.asked:
            return _fail(f"{preemption.cancelled}; {again}", REQUEUE)
        return _fail(f"interrupted; {again}", INTERRUPTED)
    except (RecipeError, PlanError):
        raise
    except Exception as error:
        if preemption.asked and not os.environ.get("RLHF_TRACEBACK"):  # what goes wrong as a machine goes
            return _fail(f"{preemption.lost(f'{type(error).__name__}: {error}')}; {again}", REQUEUE)
        # what libraries raise has no common class; whoever wants to see where it was raised asks for it
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        error = getattr(error, "cause", None) or error  # Ray wraps what an actor raised, and its traceback with it
        hint = "RLHF_TRACEBACK=1 shows where" if not isinstance(error, CheckpointError) else ""
        return _fail(f"{type(error).__name__}: {error}\n{again}{'; ' + hint if hint else ''}", FAILED)


def _report(folder: Path) -> None:
    """Write the page. It is a view: what goes wrong in it is said, and changes nothing of how the run ended."""
    from rlhf import report

    try:
        print(f"report: {report.write(folder)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        _fail(f"{folder}: its report could not be written: {type(error).__name__}: {error}", FAILED)


def plan_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override, parsed.cluster)
    if parsed.cluster is not None and not recipe.cluster.nodes:
        raise RecipeError(
            f"{parsed.cluster}: it does not say what machines there are; write [cluster] with nodes = [{{ cpus = 96, "
            "memory_gib = 1024, gpus = 8, gpu_memory_gib = 80 }]"
        )
    cluster = None if parsed.cluster is None else Cluster.of(recipe.cluster)
    print(describe(make_plan(recipe, cluster, _verdicts(parsed))))
    return 0


def bridges_command(parsed: argparse.Namespace) -> int:
    from rlhf.plan.bridges import list_bridges

    width, _, height = parsed.size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        return _fail(f"--size {parsed.size}: write width and height in pixels, such as 1024x768", UNUSABLE)
    paths = parsed.recipe or sorted(BRIDGES.glob("*.toml"))
    if not paths:
        return _fail(f"no recipes in {BRIDGES}; name recipe files, or call this where {BRIDGES} is", UNUSABLE)
    print(list_bridges(paths, (int(width), int(height)), parsed.markdown))
    return 0


def check_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override)
    folder = _folder(parsed, recipe)
    proven: list[bool] = []

    async def measured(_: Preemption) -> None:
        from actors.check import check as measure

        for verdict in await measure(recipe, folder):
            print(f"{verdict.implementation}: {verdict}")
            proven.append(verdict.proven)

    status = _carried_out(measured, recipe, folder, "the same command measures again")
    return status or (0 if any(proven) else FAILED)


def eval_command(parsed: argparse.Namespace) -> int:
    recipe = load(parsed.recipe, parsed.override)
    if recipe.evaluation.data is None:
        raise RecipeError(f"{parsed.recipe[0]}: evaluation.data is not given; name the [data] source to ask")
    evaluate = {
        "name": f"{recipe.name}-eval",
        "model": {"path": str(parsed.model), "implementation": recipe.model.implementation},
        "stages": [{"name": "evaluate", "kind": "evaluate", "evaluate": "modes"}],
    }
    from rlhf.recipe import validate

    table = recipe.model_dump(mode="json", exclude_none=True) | evaluate
    narrowed = validate(table, " + ".join(parsed.recipe))
    plan, folder = make_plan(narrowed, verdicts=_verdicts(parsed)), _folder(parsed, narrowed)
    return _carried_out(lambda notice: _run(narrowed, plan, folder, None, notice), narrowed, folder, CONTINUES)


def draw_command(parsed: argparse.Namespace) -> int:
    from rlhf.data.formatters import turn
    from rlhf.data.rows import media_of
    from rlhf.drawing import DrawingError, Painter

    for path in parsed.image:
        if not path.is_file():
            return _fail(f"--image {path}: no such file", UNUSABLE)
    try:
        shown = [media_of(path.read_bytes(), f"--image {path}") for path in parsed.image]
        painter = Painter(parsed.model, parsed.generator)
    except (DrawingError, OSError, ValueError) as error:
        return _fail(error, UNUSABLE)
    answer = painter.answer({"messages": [turn("user", parsed.question, len(shown))], "images": shown})
    print(answer.text)
    if not len(answer.conditions):
        return _fail("the answer signals no picture", FAILED)
    parsed.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(painter.draw(answer.conditions, parsed.steps, seed=parsed.seed)):
        path = parsed.out / f"{number}.png"
        picture.save(path)
        print(path)
    return 0


def reward_test_command(parsed: argparse.Namespace) -> int:
    import tomllib

    from rich.console import Console
    from rich.progress import Progress

    from rewards.base import RewardError
    from rewards.isolation import Limits
    from rlhf import trial
    from rlhf.data.rows import DataError

    try:
        options = tomllib.loads("\n".join(parsed.option))
        items = trial.answered(parsed.data) if parsed.data else trial.rolled_out(parsed.rollouts)
        limits = Limits(seconds=parsed.deadline)
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(parsed.function, total=len(items))
            found = trial.hold(
                parsed.function,
                items,
                options,
                limits,
                parsed.against,
                parsed.truth,
                parsed.minutes,
                scored=lambda count: progress.advance(task, count),
            )
    except tomllib.TOMLDecodeError as error:
        return _fail(f"--option: {error}; write it as TOML, such as 'tolerance = 0.1'", UNUSABLE)
    except (RewardError, DataError) as error:
        return _fail(error, UNUSABLE)
    print(trial.as_text(found))
    if parsed.json:
        parsed.json.write_text(json.dumps(found.as_json()) + "\n")
    if parsed.html:
        parsed.html.write_text(trial.as_page(parsed.function, found))
    return 0


def reward_new_command(parsed: argparse.Namespace) -> int:
    from rlhf.trial import begin

    try:
        made = begin(parsed.name, Path())
    except ValueError as error:
        return _fail(error, UNUSABLE)
    except FileExistsError as error:
        return _fail(f"{error.filename} is there already; take another name", UNUSABLE)
    print("\n".join(map(str, made)))
    return 0


def report_command(parsed: argparse.Namespace) -> int:
    from rlhf import report

    if not parsed.folder.is_dir():
        return _fail(f"{parsed.folder}: no such run folder; `rlhf run` makes runs/NAME", UNUSABLE)
    try:
        print(report.write(parsed.folder))
    except report.ReportError as error:
        return _fail(error, UNUSABLE)
    return 0


def submit_command(parsed: argparse.Namespace) -> int:
    from actors import jobs

    flags = {"cluster.to": parsed.to, "cluster.ray.address": parsed.address}
    written = [f"{key} = {json.dumps(value)}" for key, value in flags.items() if value is not None]
    recipe = load(parsed.recipe, [*parsed.override, *written], parsed.cluster)
    ticket = jobs.Ticket.of(recipe, parsed.recipe, parsed.override, parsed.runs)
    _require_possible(recipe, parsed)
    if parsed.dry_run:
        return _job(lambda: jobs.render(ticket, recipe, parsed.runs).removesuffix("\n"))
    return _job(lambda: jobs.submit(ticket, recipe, parsed.runs, parsed.port).job)


def resubmit_command(parsed: argparse.Namespace) -> int:
    from actors import jobs

    runs = parsed.runs = parsed.runs.absolute()
    try:
        ticket = jobs.ticket_of(parsed.job, runs)
    except jobs.JobError as error:
        return _fail(error, FAILED)
    with contextlib.ExitStack() as standing:
        try:
            standing.enter_context(contextlib.chdir(ticket.folder))  # where the user stood
        except OSError as error:
            what = f"{ticket.folder}, where {parsed.job} was submitted, cannot be entered"
            return _fail(f"{what}: {error.strerror}", FAILED)
        recipe = load(ticket.files, ticket.overrides).model_copy(update={"cluster": ticket.cluster})
        _require_possible(recipe, parsed)
        return _job(lambda: jobs.resubmit(parsed.job, recipe, runs, parsed.port).job)


def _require_possible(recipe: Recipe, parsed: argparse.Namespace) -> None:
    """Raise PlanError for a recipe that its job would refuse."""
    if recipe.cluster.to == "ray" and recipe.cluster.ray.address is None:
        make_plan(recipe, verdicts=_verdicts(parsed))  # on this machine
    elif recipe.cluster.nodes:
        make_plan(recipe, Cluster.of(recipe.cluster), _verdicts(parsed))
    else:
        check(recipe)  # the job itself looks at the machines it gets


def status_command(parsed: argparse.Namespace) -> int:
    from actors import jobs

    return _job(lambda: jobs.status(parsed.job, parsed.runs))


def logs_command(parsed: argparse.Namespace) -> int:
    from actors import jobs

    def printed() -> str:
        for piece in jobs.logs(parsed.job, parsed.runs, parsed.follow):
            print(piece, end="", flush=True)
        return ""

    return _job(printed)


def stop_command(parsed: argparse.Namespace) -> int:
    from actors import jobs

    return _job(lambda: jobs.stop(parsed.job, parsed.runs))


def list_command(parsed: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from actors import jobs

    def listed() -> str:
        known = jobs.list_jobs(parsed.runs)
        if not known:
            return f"no jobs in {parsed.runs}: `rlhf submit` makes one, and --runs names another folder"
        table = Table(Column("job", no_wrap=True), "cluster", "state", "", box=box.SIMPLE_HEAD)
        for found in known:
            table.add_row(found.job, found.to, found.word, found.why.partition("\n")[0])
        Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table, markup=False)
        return ""

    return _job(listed)


def _job(verb: Callable[[], object]) -> int:
    """Call a verb of `actors.jobs` and print its answer."""
    from actors import jobs

    try:
        answer = str(verb())
    except jobs.JobError as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt as error:
        told = str(error) or "`rlhf list` tells what became of the job"
        return _fail(f"interrupted; {told}", INTERRUPTED)
    if answer:
        print(answer)
    return 0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run folder: two drivers in one folder would overwrite each other's stages."""
    try:
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RecipeError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with --runs"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"{folder}: another `rlhf run` is using this run folder; stop it, or give the recipe another name"
            ) from None
        except OSError as error:
            raise RecipeError(
                f"{folder}: its file system locks no files ({error.strerror}), so nothing would keep a second run out; "
                "choose a folder elsewhere with --runs"
            ) from error
        yield


def _private_ray(folder: Path, join: bool = False) -> Path | None:
    """Token, loopback, no usage statistics: Ray reads its environment when it is imported. Unless it is to `join` a
    cluster, its files have a folder of their own, which is returned."""
    from actors.security import private_folder, ray_environment

    os.environ.update(ray_environment(folder, join))
    if join:
        return None
    os.environ["RAY_TMPDIR"] = str(temporary := private_folder())
    return temporary


def _stop_on_signals(preemption: Preemption) -> None:
    """SIGINT cancels the run, so that every context is left and every process ended; SIGTERM and SIGUSR1, which Slurm's
    `--signal` may send, ask it to stop."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    preemption.task = task

    def interrupt() -> None:
        preemption.withdraw()
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        loop.add_signal_handler(number, preemption.ask, number.name)


def _fail(error: object, status: int) -> int:
    print(f"rlhf: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
