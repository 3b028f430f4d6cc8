"""From a recipe's `[data.NAME]` to rows: read what is on disk, build once what is not."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.data.rows import DataError, Row, Rows, note_of, read, write
from rlhf.recipe import Source

Builder = Callable[..., list[Row]]

BUILDERS = {"digits": "rlhf.data.digits:build"}


def open_source(name: str, source: Source, seed: int, folder: str | Path) -> Rows:
    """The rows of one source. A `path` is read. A `builder` ("digits" or "module:function", called as
    build(table, rows, split, seed, options)) writes `folder/NAME.parquet` once; it is built again when the source,
    the seed or the builder's own module changed. Raises DataError.
    """
    if source.path is not None:
        return read(source.path)
    assert source.builder is not None
    build = _builder(name, source.builder)
    # two sources of the same table must not hold the same rows
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
    spec = json.dumps(
        {"source": source.model_dump(mode="json"), "seed": own_seed, "code": _code_digest(build)}, sort_keys=True
    )
    path = Path(folder) / f"{name}.parquet"
    if not path.exists() or note_of(path) != spec:
        write(build(source.table, source.rows, source.split, own_seed, dict(source.options)), path, spec)
    return read(path)


def _builder(name: str, reference: str) -> Builder:
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
