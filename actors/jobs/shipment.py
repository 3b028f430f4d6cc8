"""The files that a job needs and a cluster without the user's folder lacks: recipe files, rewards, templates.

Data and models are not shipped: they belong on the volume that all nodes share, and are named by their path there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from actors.jobs.backend import JobError
from actors.jobs.ticket import Ticket
from rewards.base import file_of, sources_of
from rewards.templates import BUILT_IN
from rlhf.recipe import BUILDERS, Rebuild, Recipe, Rl, Synthesize

OURS = {"rlhf", "actors", "rewards"}  # in every image


@dataclass
class Shipment:
    """What goes along. recipe_files: the recipe's, as the job names them; texts: what lies where, by the path seen from
    where the job stands."""

    recipe_files: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, ticket: Ticket, recipe: Recipe) -> Shipment:
        """Raises JobError for what a recipe names and cannot be shipped, with where to put it."""
        made, folder = cls(), Path(ticket.folder).resolve()
        for number, given in enumerate(ticket.files):
            path = (folder / given).resolve()
            # one from elsewhere gets a name of its own, since two may be called alike
            name = str(path.relative_to(folder)) if path.is_relative_to(folder) else f"{number}-{path.name}"
            made._add(name, path, f"recipe file {given}")
            made.recipe_files += (name,)
        for key, function in functions_of(recipe):
            made._add_code(key, function, folder)
        for name, judge in recipe.judges.items():
            if judge.template not in BUILT_IN:
                key = f"judges.{name}.template"
                made._add(_inside(key, judge.template, folder), folder / judge.template, key)
        for key, named in _stores(recipe):
            _require_there(key, named, folder, Path(ticket.runs))
        return made

    def _add(self, name: str, path: Path, key: str) -> None:
        try:
            self.texts[name] = path.read_text(encoding="utf-8")
        except OSError as error:
            raise JobError(f"{key}: {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise JobError(f"{key}: {path} is not UTF-8, and only text is shipped; save it as UTF-8") from error

    def _add_code(self, key: str, function: str, folder: Path) -> None:
        """The file of a function, what it imports from beside it, and the packages it lies in, if they are the user's
        own: what is installed here is taken to be installed there."""
        place = function.rpartition(":")[0]
        found = file_of(function) if place else None  # a name alone is an installed package's
        if found is None or (not place.endswith(".py") and not _own(found, place, folder)):
            return
        name = _inside(key, place, folder) if place.endswith(".py") else _inside(key, str(found), folder, within=True)
        self._add(name, folder / name, key)
        try:
            files = sources_of(folder / name)
        except SyntaxError as error:
            raise JobError(f"{key}: {name} is not Python: {error}") from error
        for file in list(files):
            packages = [up / "__init__.py" for up in file.parents if up.is_relative_to(folder) and up != folder]
            files += [package for package in packages if package.is_file()]
        for file in files:
            self._add(_inside(key, str(file), folder, within=True), file, key)


def functions_of(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every function that a recipe names, under its key."""
    for name, source in recipe.data.items():
        if source.builder is not None:
            yield f"data.{name}.builder", BUILDERS.get(source.builder, source.builder)
    evaluation = recipe.evaluation
    yield "evaluation.answer", evaluation.answer
    yield "evaluation.format", evaluation.format
    if evaluation.soundness is not None:
        yield "evaluation.soundness", evaluation.soundness
    for stage in recipe.stages:
        if isinstance(stage, Rl):
            for name, part in stage.rewards.items():
                if part.function is not None:
                    yield f"stages.{stage.name}.rewards.{name}.function", part.function
        elif isinstance(stage, Synthesize):
            yield f"stages.{stage.name}.answer", stage.answer
            if stage.critic is not None:
                yield f"stages.{stage.name}.critic", stage.critic


def _stores(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every folder or file of data or weights that a recipe names (a model: perhaps by its hub name), under its key."""
    named = {f"data.{name}.path": source.path for name, source in recipe.data.items()}
    named |= {"model.path": recipe.model.path, "model.tokenizer.path": recipe.model.tokenizer.path}
    for stage in recipe.stages:
        if isinstance(stage, Rl):
            named |= {f"stages.{stage.name}.record": stage.record, f"stages.{stage.name}.replay": stage.replay}
        elif isinstance(stage, Rebuild):
            named |= {f"stages.{stage.name}.parts.{slot}.path": part.path for slot, part in stage.parts.items()}
    for key, value in named.items():
        if value is not None:
            yield key, value


def _require_there(key: str, named: str, folder: Path, runs: Path) -> None:
    path = Path(named)
    of_models = not key.startswith("data.") and not key.endswith((".record", ".replay"))
    if path.is_relative_to(runs) or (of_models and not path.is_absolute() and not (folder / path).exists()):
        return  # on the volume, or a hub name
    raise JobError(
        f"{key} = {named!r}: data and models are not shipped with a job; put it on the volume that all nodes share and "
        f"name it by its path there, below {runs}"
    )


def _own(found: Path, module: str, folder: Path) -> bool:
    """Whether a module lies in the user's folder, and is neither ours nor of an environment in it."""
    path = found.resolve()
    installed = path.is_relative_to(sys.prefix) or "site-packages" in path.parts
    return path.is_relative_to(folder) and not installed and module.partition(".")[0] not in OURS


def _inside(key: str, named: str, folder: Path, within: bool = False) -> str:
    """The path as seen from the user's folder. within: of a file that was found, else as the recipe has it."""
    path = (folder / named).resolve()
    if not path.is_relative_to(folder) or (not within and Path(named).is_absolute()):
        raise JobError(
            f"{key} = {named!r} is not named from {folder}, where you stand, and would not be found by a job; move it "
            "there and give its path from there"
        )
    return str(path.relative_to(folder))
