"""What was submitted: enough to ask about a job, and to submit it again.

runs/.jobs/NAME.json    one a job, kept beside the run folders of whoever submitted it
"""

from __future__ import annotations

import re
import secrets
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actors.jobs.record import JobError, read
from rlhf.checkpoint import write_json
from rlhf.recipe import ClusterTable, Recipe

FOLDER = ".jobs"


@dataclass(frozen=True)
class Ticket:
    """A submitted job.

    job      its name here, made of the recipe's, the time and four random digits
    recipe   the recipe's name, which is its run folder's
    files    recipe files as given, seen from `folder`, where the user stood; overrides: as given
    runs     where run folders lie, for the job: cluster.runs, else the folder here
    cluster  [cluster] with the site's file and all flags laid over
    native   what the cluster calls the job: Ray's submission id, Slurm's job id, the RayJob's name; "" while it is on
             its way, and where it was perhaps handed over
    """

    job: str
    recipe: str
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    folder: str
    runs: str
    cluster: ClusterTable
    native: str = ""

    @classmethod
    def of(cls, recipe: Recipe, files: Sequence[str | Path], overrides: Sequence[str], runs: Path) -> Ticket:
        """A new ticket of a recipe that was read from `files` and `overrides`, from where this process stands."""
        there = str(Path(recipe.cluster.runs or runs).absolute())
        given, folder = tuple(map(str, files)), str(Path.cwd())
        return cls(_name(recipe.name), recipe.name, given, tuple(overrides), folder, there, recipe.cluster)

    @property
    def run_folder(self) -> tuple[str, ...]:
        """What two jobs that would write into one run folder have in common: its path, and the volume it is on, or the
        Ray cluster whose machines see it."""
        cluster, place = self.cluster, tuple[str, ...]()
        if cluster.to == "kuberay":
            place = (cluster.kuberay.namespace, cluster.kuberay.claim or "")
        elif cluster.to == "ray" and cluster.ray.address is not None and cluster.runs is not None:  # else it lies here
            place = (cluster.ray.address,)
        return str(Path(self.runs) / self.recipe), *place

    def again(self) -> Ticket:
        """The same under a new name, not handed over yet."""
        return replace(self, job=_name(self.recipe), native="")

    def arguments(self, files: Sequence[str] | None = None) -> list[str]:
        """What `rlhf run` is given there, from a folder with the contents of `folder`: the recipe's files (`files`: as
        they are called there), the overrides, what [cluster] says of any cluster as it was resolved here, and the run
        folders' place. `--address` is the backend's."""
        import tomli_w

        own = {"ray", "kuberay", "slurm"}  # how to hand a job over, which is done; and its environment is nobody else's
        cluster = self.cluster.model_dump(mode="json", exclude=own, exclude_unset=True, exclude_none=True)
        others = [override for override in self.overrides if tomllib.loads(override).keys() != {"cluster"}]
        overrides = [*others, *([tomli_w.dumps({"cluster": cluster})] if cluster else [])]
        return [
            *(files or self.files),
            *(part for override in overrides for part in ("-o", override)),
            "--runs",
            self.runs,
        ]


def _name(recipe: str) -> str:
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def is_name(job: str, recipe: str) -> bool:
    """Whether a job of that recipe may be called so."""
    return re.fullmatch(rf"{re.escape(recipe)}-\d{{8}}-\d{{6}}-[0-9a-f]{{4}}", job) is not None


def path_of(job: str, runs: Path) -> Path:
    """Where the ticket of that name is kept."""
    return runs / FOLDER / f"{job}.json"


def keep(ticket: Ticket, runs: Path) -> None:
    """Write the ticket beside the run folders, whole or not at all, for its owner's eyes: an environment is in it."""
    (runs / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
    cluster = ticket.cluster.model_dump(mode="json", exclude_unset=True)
    write_json(path_of(ticket.job, runs), asdict(ticket) | {"cluster": cluster})


def drop(ticket: Ticket, runs: Path) -> None:
    """Of a job that was not handed over."""
    path_of(ticket.job, runs).unlink(missing_ok=True)


def find(job: str, runs: Path) -> Ticket | None:
    """The ticket of that name, if there is one. Raises JobError for one that cannot be read."""
    remedy = f"the job may still run: look for {job!r} on its cluster, then remove the file"
    return read(path_of(job, runs), _made, remedy)


def names(runs: Path) -> list[str]:
    """All jobs of a runs folder, the oldest first. Raises JobError where they cannot be listed."""
    folder = runs / FOLDER
    try:
        kept = [path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise JobError(f"{folder}: cannot be read ({error.strerror}); make it a folder that you may read") from error
    return [path.stem for path in sorted(kept, key=_written)]


def _written(path: Path) -> int:
    """When; one that has gone since was the first."""
    try:
        return path.lstat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _made(kept: dict[str, Any]) -> Ticket:
    lists = {name: tuple(kept[name]) for name in ("files", "overrides")}
    return Ticket(**kept | lists | {"cluster": ClusterTable.model_validate(kept["cluster"])})
