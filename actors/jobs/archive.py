"""What a node is sent of the user's folder, as one archive: all but what git ignores, runs, caches, environments."""

from __future__ import annotations

import contextlib
import os
import subprocess
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.jobs.backend import JobError
from actors.jobs.head import HEAD_FOLDER
from actors.jobs.ticket import FOLDER
from rlhf.recipe import Recipe

LIMIT_MIB = 500  # Ray carries 512 in a message
LARGEST = 5  # entries named when there is too much
GIT_SECONDS = 60.0
RECIPES = ".recipes"  # of files that lie elsewhere
NEVER = {".git", "__pycache__", "node_modules", FOLDER, HEAD_FOLDER}  # the last two hold keys and tokens
MARKS = ("pyvenv.cfg", "CACHEDIR.TAG")  # of folders that are made anew: virtual environments, caches
WRITTEN_AT = (1980, 1, 1, 0, 0, 0)  # the same contents are the same archive, which is then there already
PATHS = ("path", "replay")  # keys of a recipe whose values are paths, with or without a slash


@dataclass(frozen=True)
class Archive:
    """What of `folder` goes to the cluster: `files`, seen from it, and recipe files from elsewhere by the name they
    have there."""

    folder: Path
    files: tuple[Path, ...]
    recipes: dict[str, str]

    def write(self, path: Path) -> None:
        """Write it, as a zip file. Raises JobError for a file that cannot be read."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for source, name in [(self.folder / file, str(file)) for file in self.files] + [
                (self.folder / given, name) for given, name in self.recipes.items()
            ]:
                entry = zipfile.ZipInfo(name, WRITTEN_AT)
                entry.compress_type = zipfile.ZIP_DEFLATED
                with _reading():
                    mode, contents = source.stat().st_mode, source.read_bytes()
                entry.external_attr = (mode & 0o777) << 16
                zipped.writestr(entry, contents)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Raise JobError for what of the folder cannot be read."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{error.filename}: cannot be read ({error.strerror}), and goes with a job from here; make it readable, or "
            "move it out of the folder"
        ) from error


def archive_of(folder: Path, recipe_files: Sequence[str], recipe: Recipe, runs: Sequence[Path]) -> Archive:
    """Choose what is sent; never `runs`, where run folders lie. Raises JobError when it is too much or cannot be read
    or named, when run folders lie in the folder itself, among what is sent, and when the recipe names what lies in the
    folder and is not sent, or a place in it to write to."""
    root = folder.resolve()
    if any(path.resolve() == root for path in runs):
        raise JobError(
            f"{folder} is sent to the cluster, and run folders, which are not, would lie among its files; name another "
            "folder for them, with --runs or cluster.runs, or submit from another"
        )
    left = {folder / path.resolve().relative_to(root) for path in runs if path.resolve().is_relative_to(root)}
    with _reading():
        files = tuple(sorted(_kept(folder, folder, left)))
        _require_small(folder, files)
    _require_names(files)
    sent = {*files, *(parent for file in files for parent in file.parents)}
    for key, value in _paths(recipe.model_dump(exclude={"cluster"})):
        here = Path(os.path.normpath(value))
        if key.endswith(".record") and not here.is_absolute():
            raise JobError(f"{key} = {value!r}: the job's folder is a copy that goes with it; name an absolute path")
        if here.is_absolute() or here in sent or not (folder / here).exists():
            continue
        raise JobError(
            f"{key} = {value!r} is not sent to the cluster: it is outside {folder}, ignored by git, or a cache; name "
            "the absolute path that it has on every node"
        )
    elsewhere = [file for file in recipe_files if Path(os.path.normpath(file)) not in sent]
    return Archive(folder, files, {file: f"{RECIPES}/{i}-{Path(file).name}" for i, file in enumerate(elsewhere)})


def _kept(folder: Path, root: Path, left: Collection[Path]) -> Iterator[Path]:
    """The files under a folder that are sent, seen from `root`. A link to a folder is no file, and is not followed."""
    tracked = any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents))
    for path in _known_to_git(folder) if tracked else sorted(folder.iterdir()):
        if path == folder:  # all that git says of a submodule that is not there
            continue
        inner = (path, *(parent for parent in path.parents if folder in parent.parents))
        if any(_is_left(one, left) for one in inner):
            continue
        if path.is_dir() and not path.is_symlink():  # without git; or a repository within it
            yield from _kept(path, root, left)
        elif path.is_file():
            yield path.relative_to(root)


def _is_left(path: Path, left: Collection[Path]) -> bool:
    return path.name in NEVER or path in left or (path.is_dir() and any((path / mark).is_file() for mark in MARKS))


def _known_to_git(folder: Path) -> list[Path]:
    """What git tracks in a folder, or would if it were told to."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=GIT_SECONDS)
    except subprocess.CalledProcessError as error:
        raise JobError(f"{folder}: git cannot tell what is ignored here: {error.stderr.decode().strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobError(f"{folder} is a git repository, and git, which knows what it ignores, fails: {error}") from error
    return [folder / os.fsdecode(name).rstrip("/") for name in done.stdout.split(b"\0") if name]


def _require_names(files: Sequence[Path]) -> None:
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError as error:
            raise JobError(f"{str(file)!r}: the name is not UTF-8, and cannot be sent; rename the file") from error


def _require_small(folder: Path, files: Sequence[Path]) -> None:
    sizes = dict[str, int]()
    for file in files:
        entry = "/".join(file.parts[:2])
        sizes[entry] = sizes.get(entry, 0) + (folder / file).stat().st_size
    total = sum(sizes.values()) / 2**20
    if total > LIMIT_MIB:
        largest = sorted(sizes, key=lambda entry: -sizes[entry])[:LARGEST]
        named = ", ".join(f"{entry} ({sizes[entry] / 2**20:.0f} MiB)" for entry in largest)
        raise JobError(
            f"{folder} has {total:.0f} MiB to send, and {LIMIT_MIB} can be: {named}; name them in .gitignore and give "
            "the recipe their absolute paths on the cluster, or submit from another folder"
        )


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Strings of a recipe that may be paths, by their keys; of "path/file.py:function" the path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _paths(inner, f"{key}.{inner['name'] if isinstance(inner, dict) and 'name' in inner else index}")
    elif isinstance(value, str) and "\n" not in value:
        last, path = key.rpartition(".")[2], value.partition(".py:")[0] + (".py" if ".py:" in value else "")
        if last in PATHS or last == "record" or "/" in path:
            yield key, path
