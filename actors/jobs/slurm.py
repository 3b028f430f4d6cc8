"""Jobs of a Slurm cluster: a batch script that starts a Ray cluster over its allocation.

Everything goes by Slurm's own commands, from a machine that sees the folders that the nodes see, at the same paths.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.jobs.backend import JobError, State, machines_of
from actors.jobs.command import RefusedError, ask
from actors.jobs.ticket import Ticket
from rlhf.preemption import REQUEUE
from rlhf.recipe import NodesTable, Recipe

LOGIN = "submit from a login node of the cluster, where sbatch, squeue, sacct and scancel are"
OBJECT_STORE = 0.3  # of a node's memory, as Ray itself would take it: here of what the job has of a node
FOLLOW_SECONDS, ASK_SECONDS = 1.0, 15.0  # between looks at the log; between questions whether the job has ended
RAY_END_SECONDS = 60  # that Ray may take to end on all nodes, after the driver
END_SECONDS = RAY_END_SECONDS + 60.0  # and Slurm, to tell of it
STOPPED = 76  # exit status of the script: told to go by us; REQUEUE, where it was not queued again
NO_ACCOUNTS = re.compile("accounting storage is disabled", re.IGNORECASE)  # says sacct
# what `render` writes itself, each from its place in [cluster]
OWN_OPTIONS = (
    *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "gpus-per-node", "time", "partition", "qos"),
    *("account", "output", "open-mode", "signal", "requeue"),
)
LONG_NAME = re.compile("[a-z][a-z0-9-]+")  # of an option of sbatch
# Slurm's word for a job: ours
STATES = {
    "PENDING": State.WAITING,
    "CONFIGURING": State.WAITING,
    "REQUEUED": State.WAITING,
    "REQUEUE_HOLD": State.WAITING,
    "REQUEUE_FED": State.WAITING,
    "SPECIAL_EXIT": State.WAITING,
    "RESV_DEL_HOLD": State.WAITING,
    "SUSPENDED": State.WAITING,
    "STOPPED": State.WAITING,
    "RUNNING": State.RUNNING,
    "COMPLETING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "COMPLETED": State.SUCCEEDED,
    "CANCELLED": State.STOPPED,
    "PREEMPTED": State.PREEMPTED,
    **dict.fromkeys(("BOOT_FAIL", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL"), State.FAILED),
    **dict.fromkeys(("OUT_OF_MEMORY", "RECONFIG_FAIL", "TIMEOUT"), State.FAILED),
}


@dataclass(frozen=True)
class Slurm:
    """The Slurm backend."""

    def render(self, ticket: Ticket, recipe: Recipe) -> str:
        here, nodes = Path(__file__), _nodes(ticket)
        store = math.floor(nodes.memory_gib * OBJECT_STORE * 2**30)
        resources = [
            f"--num-cpus={nodes.cpus}",
            f"--num-gpus={nodes.gpus}",
            f"--object-store-memory={store}",
            f"--memory={math.floor(nodes.memory_gib * 2**30) - store}",
        ]
        variables = {
            "job": ticket.job,
            "folder": str(_folder(ticket)),
            "work": ticket.folder,
            "nodes": str(nodes.count),
            "cpus": str(nodes.cpus),
            "start_seconds": str(math.ceil(recipe.deadlines.start)),
        }
        setup = "\n".join(f"  {line}" for line in ticket.cluster.slurm.setup or [":"])
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH --{option}" for option in _options(ticket, nodes)),
                "# shellcheck disable=SC2329  # traps call functions, and nodes are sent some",
                "set -euo pipefail",
                "",
                *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
                f"resources=({shlex.join(resources)})",
                f"arguments=({shlex.join(ticket.arguments())})",
                "",
                f"setup() {{\n{setup}\n}}",
                "",
                here.with_name("attend.sh").read_text(),
                here.with_name("slurm.sh").read_text(),
            ]
        )

    def submit(self, ticket: Ticket, recipe: Recipe) -> str:
        script = self.render(ticket, recipe)
        if shutil.which("sbatch") is None:
            raise JobError(f"there is no sbatch here: {LOGIN}")
        try:
            _folder(ticket).mkdir(parents=True, exist_ok=True)  # Slurm does not make what the log lies in
        except OSError as error:
            raise JobError(f"{_folder(ticket)} cannot be made ({error.strerror}); is cluster.runs right?") from error
        # "17", or "17;cluster"
        return ask("sbatch", "--parsable", given=script, absent=LOGIN).strip().partition(";")[0]

    def state(self, ticket: Ticket) -> tuple[State, str]:
        try:
            queued = ask("squeue", "--noheader", f"--jobs={ticket.native}", "--format=%T|%r", absent=LOGIN).strip()
        except RefusedError as refused:
            if "Invalid job id" not in refused.said:  # what squeue says of those it has forgotten
                raise
            queued = ""
        if queued:
            word, _, reason = queued.splitlines()[0].partition("|")
            # one that is not known here is in the queue all the same, and two jobs cannot share a run folder
            return STATES.get(word, State.RUNNING), _why(word, reason)
        return _ended(ticket)

    def logs(self, ticket: Ticket, follow: bool) -> Iterator[str]:
        path = _log(ticket)
        if not path.exists() and not follow:
            state, why = self.state(ticket)
            raise JobError(f"{path} is not there: job {ticket.job!r} is {state.value}" + (f" ({why})" if why else ""))
        place, asked, ended = 0, -math.inf, False
        while True:
            if follow and time.monotonic() - asked > ASK_SECONDS:
                ended, asked = self.state(ticket)[0].ended, time.monotonic()  # before the last look, which is then all
            if path.exists():
                with path.open(errors="replace") as log:
                    log.seek(place)
                    if printed := log.read():
                        yield printed
                    place = log.tell()
            if ended or not follow:
                return
            time.sleep(FOLLOW_SECONDS)

    def stop(self, ticket: Ticket) -> None:
        state, _ = self.state(ticket)
        if state is State.WAITING:
            ask("scancel", ticket.native, absent=LOGIN)
        elif state is State.RUNNING:
            # to the batch shell alone: the driver saves while its actors live, and the job is not queued again
            ask("scancel", "--batch", "--signal=INT", ticket.native, absent=LOGIN)
        deadline = time.monotonic() + ticket.cluster.grace_seconds + END_SECONDS
        while not self.state(ticket)[0].ended:
            if time.monotonic() > deadline:
                ask("scancel", ticket.native, absent=LOGIN)
                raise JobError(
                    f"job {ticket.job!r} did not end within cluster.grace_seconds = {ticket.cluster.grace_seconds} and "
                    f"{END_SECONDS:g} s, and was cancelled; `rlhf resubmit` continues from its last checkpoint"
                )
            time.sleep(FOLLOW_SECONDS)


def _nodes(ticket: Ticket) -> NodesTable:
    """The machines of a job, which are of one kind. Raises JobError for others, or none."""
    kinds = machines_of(ticket)
    if len(kinds) > 1:
        raise JobError(
            f"[[cluster.nodes]] has {len(kinds)} kinds of machine, and a job of Slurm gets one kind; give one table, "
            "with the `count` of all and what the least of them has"
        )
    return kinds[0]


def _options(ticket: Ticket, nodes: NodesTable) -> list[str]:
    """What sbatch reads at the head of the script."""
    cluster = ticket.cluster
    for name in cluster.slurm.options:
        _require_free(name)
    notice = cluster.grace_seconds + RAY_END_SECONDS
    if cluster.hours is not None and cluster.hours * 3600 <= notice:
        raise JobError(
            f"cluster.hours = {cluster.hours:g} is no longer than the {notice} s before its end in which a job saves "
            "and leaves; raise it, or lower cluster.grace_seconds"
        )
    options = {
        "job-name": ticket.job,
        "nodes": str(nodes.count),
        "ntasks-per-node": "1",
        "cpus-per-task": str(nodes.cpus),
        "mem": f"{math.floor(nodes.memory_gib * 1024)}M",
        **({"gpus-per-node": str(nodes.gpus)} if nodes.gpus else {}),
        **({} if cluster.hours is None else {"time": _clock(cluster.hours)}),
        **({} if cluster.queue is None else {"partition": cluster.queue}),
        **({} if cluster.priority is None else {"qos": cluster.priority}),
        **({} if cluster.slurm.account is None else {"account": cluster.slurm.account}),
        "output": str(_log(ticket)).replace("%", "%%"),
        "open-mode": "append",
        "signal": f"B:USR1@{notice}",  # to this shell alone
        **{name.removeprefix("--"): value for name, value in cluster.slurm.options.items()},
    }
    for name, value in options.items():
        if "\n" in value:
            raise JobError(f"sbatch's option {name} = {value!r} has a line break; remove it")
    return [*(f"{name}={shlex.quote(value)}" if value else name for name, value in options.items()), "requeue"]


def _require_free(name: str) -> None:
    """Raise JobError for an option of sbatch that a site may not give."""
    key, option = f"cluster.slurm.options.{name}", name.removeprefix("--")
    if not LONG_NAME.fullmatch(option):
        raise JobError(f'{key}: this is no long name of an option; write it as in {{ constraint = "h100" }}')
    if option in OWN_OPTIONS:
        raise JobError(f"{key}: this one is made of other keys of [cluster]; remove it")
    if option == "array":
        raise JobError(f"{key}: the jobs of an array would share one run folder; remove it, and submit each by itself")


def _clock(hours: float) -> str:
    """HH:MM:SS."""
    seconds = math.ceil(hours * 3600)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _folder(ticket: Ticket) -> Path:
    """The run folder."""
    return Path(ticket.runs) / ticket.recipe


def _log(ticket: Ticket) -> Path:
    return _folder(ticket) / f"{ticket.job}.log"


def _why(word: str, reason: str) -> str:
    """Slurm's words beyond the state; of a job that waits, what it waits for."""
    plain = word.lower().replace("_", " ")
    told = "" if reason in ("None", "") else reason
    if word == "PENDING":
        return f"in Slurm's queue: {told or 'not looked at yet'}"
    return told if word == "RUNNING" else f"{plain}: {told}" if told else plain


def _remembered(ticket: Ticket) -> str | None:
    """What the controller knows of a job, as sacct would say it; None where it has forgotten it."""
    try:
        told = ask("scontrol", "show", "job", ticket.native, "-o", absent=LOGIN)
    except RefusedError as refused:
        if "Invalid job id" not in refused.said:
            raise
        return None
    fields = dict(word.partition("=")[::2] for word in told.split())
    return f"{fields['JobState']}|{fields['ExitCode']}"


def _ended(ticket: Ticket) -> tuple[State, str]:
    """Of a job that has left the queue, by Slurm's accounting, or where it keeps none, by its controller, which
    remembers a job for some minutes."""
    columns = "--format=State,ExitCode"
    try:
        rows = ask(
            *("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={ticket.native}", columns), absent=LOGIN
        )
    except RefusedError as refused:
        if not NO_ACCOUNTS.search(refused.said):
            raise
        remembered = _remembered(ticket)
        if remembered is None:
            return State.FAILED, "Slurm keeps no accounts, so how it ended is not known"
        rows = remembered
    if not rows.strip():
        raise JobError(f"neither squeue nor sacct knows job {ticket.native} ({ticket.job}); is this its cluster?")
    told, _, code = rows.splitlines()[-1].partition("|")
    word = told.partition(" ")[0].rstrip("+")  # "CANCELLED by 1000"
    status = code.partition(":")[0]  # of "75:0", where the second is a signal
    if word == "FAILED" and status == str(STOPPED):
        return State.STOPPED, "it was stopped"
    if word == "FAILED" and status == str(REQUEUE):
        return State.PREEMPTED, "it was not queued again"
    why = f"exit status {status}" if word == "FAILED" else told.lower().replace("_", " ")
    return STATES.get(word, State.FAILED), "" if word == "COMPLETED" else why
