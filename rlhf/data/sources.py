"""From a recipe's `[data.NAME]` to rows: read what is on disk, build once what is not."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.data.formatters import formatted
from rlhf.data.rows import DataError, Row, Rows, note_of, read, write
from rlhf.data.selectors import select
from rlhf.recipe import BUILDERS, Source

Builder = Callable[..., list[Row]]

WORTH_A_PROCESS = 5_000  # rows: starting one takes as long as building a few thousand
HELPER_DEADLINE = 600.0  # seconds


def open_source(name: str, source: Source, seed: int, folder: str | Path) -> Rows:
    """The rows of one source. A `path` is read. A `builder` ("digits" or "module:function", called as
    build(table, rows, split, seed, options)) writes `folder/NAME.parquet` once; it is built again when the source,
    the seed or the builder's own module changed. `format` makes conversations of them, and `select` chooses among them.
    Raises DataError."""
    rows = formatted(_all(name, source, seed, folder), source.format)
    return select(rows, source.select, _seed(name, seed))


def _all(name: str, source: Source, seed: int, folder: str | Path) -> Rows:
    if source.path is not None:
        return read(source.path)
    path, spec = _built(name, source, seed, folder)
    if not _holds(path, spec):
        build = _builder(name, source.builder)
        rows = build(source.table, source.rows, source.split, _seed(source.like or name, seed), dict(source.options))
        write(rows, path, spec)
    return read(path)


def open_sources(sources: Mapping[str, Source], seed: int, folder: str | Path) -> dict[str, Rows]:
    """Every source. Where many rows must be built, a second process builds about half of them. Raises DataError."""
    missing = [name for name, source in sources.items() if _is_missing(name, source, seed, folder)]
    missing.sort(key=lambda name: sources[name].rows or 0, reverse=True)
    theirs = {name: sources[name] for name in missing[1::2]}
    if sum(source.rows or 0 for source in theirs.values()) < WORTH_A_PROCESS:
        return {name: open_source(name, source, seed, folder) for name, source in sources.items()}
    helper = multiprocessing.get_context("spawn").Process(target=_build_all, args=(theirs, seed, folder), daemon=True)
    helper.start()
    for name in missing[::2]:
        open_source(name, sources[name], seed, folder)
    helper.join(HELPER_DEADLINE)
    # what the helper has not built is tried here, where an error reaches the user
    return {name: open_source(name, source, seed, folder) for name, source in sources.items()}


def _build_all(sources: Mapping[str, Source], seed: int, folder: str | Path) -> None:
    for name, source in sources.items():
        with contextlib.suppress(DataError):
            open_source(name, source, seed, folder)


def _is_missing(name: str, source: Source, seed: int, folder: str | Path) -> bool:
    return source.path is None and not _holds(*_built(name, source, seed, folder))


def _holds(path: Path, spec: str) -> bool:
    return path.exists() and note_of(path) == spec


def _built(name: str, source: Source, seed: int, folder: str | Path) -> tuple[Path, str]:
    """Where the rows of a builder lie, and the note they bear when they are those of this source."""
    code = _code_digest(_builder(name, source.builder))
    spec = {
        "source": source.model_dump(mode="json", exclude={"select", "format"}),
        "seed": _seed(source.like or name, seed),
        "code": code,
    }
    return Path(folder) / f"{name}.parquet", json.dumps(spec, sort_keys=True)


def _seed(name: str, seed: int) -> int:
    """Two sources of the same table must not hold the same rows."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _builder(name: str, reference: str | None) -> Builder:
    assert reference is not None
    module_name, _, function_name = BUILDERS.get(reference, reference).partition(":")
    known = f'known builders are {", ".join(BUILDERS)}; your own is "module:function"'
    if not function_name:
        raise DataError(f"data.{name}.builder = {reference!r}: no such builder; {known}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(f"data.{name}.builder = {reference!r}: {error}; {known}") from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"data.{name}.builder = {reference!r}: {module_name} has no function {function_name!r}")
    builder: Builder = function
    return builder


def _code_digest(build: Builder) -> str:
    """Of the builder's module and of what it takes from modules of its own package."""
    own = inspect.getmodule(build)
    if own is None:
        return ""
    package = own.__name__.rpartition(".")[0]
    used = {inspect.getmodule(value) for value in vars(own).values()} - {None}
    modules = [own, *(module for module in used if module and package and module.__name__.startswith(f"{package}."))]
    texts = {}
    for module in modules:
        try:
            texts[module.__name__] = inspect.getsource(module)
        except OSError:
            # a builder typed into an interpreter has no file; its rows follow the spec alone
            continue
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
