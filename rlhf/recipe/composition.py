"""From files and overrides to one recipe; every mistake names the file, the key, and what to do."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlhf.recipe.rewards import JudgeTable
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stages import Evaluate, Merge, Preference, Rebuild, RewardModel, Rl, Sft, Synthesize
from rlhf.recipe.table import Table

KINDS: dict[str, type[Table]] = {
    "sft": Sft,
    "preference": Preference,
    "reward_model": RewardModel,
    "rl": Rl,
    "rebuild": Rebuild,
    "merge": Merge,
    "synthesize": Synthesize,
    "evaluate": Evaluate,
}
# what other systems call our keys
ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "max_grad_norm": "clip_grad",
    "max_steps": "steps",
    "num_steps": "steps",
    "train_batch_size": "batch_size",
    "num_generations": "group_size",
    "rollout_n": "group_size",
    "max_new_tokens": "max_tokens",
    "max_completion_length": "max_tokens",
    "tensor_parallel_size": "tensor_parallel",
    "world_size": "trainer_ranks",
}
EVERY = "*"  # in place of a stage's or a source's name
Layer = tuple[str, dict[str, Any], int]  # a file or an override: its name, what it holds, the keys it spells out


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key, what is wrong and what to do."""


def load(paths: Sequence[str | Path], overrides: Sequence[str] = (), site: str | Path | None = None) -> Recipe:
    """Read and compose recipe files, lay the [cluster] of a `site` file over them, then apply overrides written as TOML
    (`stages.NAME.key = value`).

    Raises RecipeError naming file and key.
    """
    if not paths:
        raise RecipeError("no recipe given; try recipes/think_fusion_digits.toml")
    layers: list[Layer] = [(str(path), _read(Path(path)), 0) for path in paths]
    if site is not None:
        layers.append((str(site), _site(Path(site)), 0))
    for override in overrides:
        origin = f"override {override!r}"
        layers.append((origin, _parse(override, origin), _keys_written(override)))
    merged: dict[str, Any] = {}
    for origin, table, written in layers:
        merged = _merge(merged, table, origin, written)
    return validate(merged, " + ".join(map(str, paths)), layers)


def validate(table: dict[str, Any], origin: str, layers: Sequence[Layer] = ()) -> Recipe:
    """Check a composed table against the schema. Raises RecipeError with every problem, one a line, each under the
    last of its `layers` that wrote the key, or under `origin`."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(table, origin, layers, error.errors()))) from error


def load_judge(path: Path, name: str) -> JudgeTable:
    """[judges.NAME] of a recipe's file, whatever else is in it. Raises RecipeError as `load` does."""
    table = _read(path)
    found = table.get("judges")
    judges = found if isinstance(found, dict) else {}
    if name not in judges:
        raise RecipeError(f"{path}: no [judges.{name}]; there are {', '.join(judges) or 'none'}")
    try:
        return JudgeTable.model_validate(judges[name])
    except ValidationError as error:
        problems = [{**problem, "loc": ("judges", name, *problem["loc"])} for problem in error.errors()]
        raise RecipeError("\n".join(_explain(table, str(path), (), problems))) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    return _parse(text, str(path))


def _site(path: Path) -> dict[str, Any]:
    """A site's own file: where a job runs, and nothing of what it does."""
    table = _read(path)
    if other := sorted(table.keys() - {"cluster"}):
        raise RecipeError(
            f"{path}: a site file holds [cluster] alone, and this one {', '.join(other)} too; move that to a recipe"
        )
    if not isinstance(table.get("cluster"), dict):
        raise RecipeError(f"{path}: a site file says where jobs run; write [cluster] with keys and values")
    return table


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin}: not valid TOML: {error}") from error


def _keys_written(override: str) -> int:
    """How many keys the left side of `a.b.c = value` has."""
    for equals in (place for place, sign in enumerate(override) if sign == "="):
        try:
            inner: Any = tomllib.loads(override[:equals] + "= 0")
        except tomllib.TOMLDecodeError:
            continue  # an equals sign inside a quoted key
        depth = 0
        while isinstance(inner, dict) and len(inner) == 1:
            inner, depth = next(iter(inner.values())), depth + 1
        return depth
    return 0


def _merge(
    base: dict[str, Any], over: dict[str, Any], origin: str, written: int = 0, path: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`base` changed by `over`. `written`: so many keys of a path the writer spelled out, and what they lead through
    is changed and not replaced."""
    merged = dict(base)
    for key, value in over.items():
        old, here = merged.get(key), (*path, key)
        if here == ("stages",):
            merged[key] = _merge_stages(old, value, origin, written)
        elif here == ("data", EVERY):
            for name in list(merged):
                merged = _merge(merged, {name: value}, origin, written, path)
        elif value == {"remove": True} and here[-1] != "options":  # a builder's options are its own
            if key not in merged:
                raise RecipeError(f"{origin}: there is no {'.'.join(here)} to remove")
            del merged[key]
        elif isinstance(old, dict) and isinstance(value, dict) and not _is_replaced(here, old, value, written):
            merged[key] = _merge(old, value, origin, written, here)
        else:
            merged[key] = value
    return merged


def _is_replaced(path: tuple[str, ...], old: dict[str, Any], new: dict[str, Any], written: int) -> bool:
    """Whether a table is one thing: a mix of data, a choice of what trains or is dropped, unless a key of it is spelled
    out; a source that turns from a builder to a path or back."""
    if path[0] == "stages":
        return len(path) == 3 and path[2] in ("data", "train", "drop") and written <= len(path)
    kinds = {"path", "builder"}
    return path[0] == "data" and len(path) == 2 and bool(kinds & new.keys()) and not kinds & new.keys() & old.keys()


def _merge_stages(base: list[dict[str, Any]] | None, over: Any, origin: str, written: int) -> list[dict[str, Any]]:
    """`[[stages]]` appends or changes by name; `stages.NAME.key = …` changes one, or appends one that has a `kind`;
    `stages."*".KIND.key = …` changes all of a kind that are there."""
    changes = over
    if isinstance(over, dict):
        changes = [fields | {"name": name} if isinstance(fields, dict) else fields for name, fields in over.items()]
    if not isinstance(changes, list) or not all(
        isinstance(change, dict) and isinstance(change.get("name"), str) for change in changes
    ):
        raise RecipeError(f"{origin}: stages are written [[stages]] with a `name` each, or [stages.NAME]")
    if base is None and isinstance(over, list):
        return changes  # with two of one name, if it has them: the plan refuses that
    merged = {stage["name"]: stage for stage in base or []}
    for change in changes:
        name = change["name"]
        if name == EVERY:
            merged = {own: _of_kind(stage, change, origin, written) for own, stage in merged.items()}
        elif name in merged and change.get("remove") is True:
            del merged[name]
        elif name in merged:
            merged[name] = _merge(merged[name], change, origin, written, ("stages", name))
        elif change.get("remove") is True or (isinstance(over, dict) and "kind" not in change):
            known = f"the stages are {', '.join(map(str, merged))}" if merged else "lay this over a recipe that has it"
            raise RecipeError(f"{origin}: no stage named {name!r}; {known}")
        else:
            merged[name] = change
    return list(merged.values())


def _of_kind(stage: dict[str, Any], change: dict[str, Any], origin: str, written: int) -> dict[str, Any]:
    """The stage with what `[stages."*".KIND]` says of its kind."""
    for kind, fields in change.items():
        if kind != "name" and (kind not in KINDS or not isinstance(fields, dict)):
            known = ", ".join(KINDS)
            raise RecipeError(f'{origin}: [stages."{EVERY}"] holds tables by kind, and {kind!r} is none of {known}')
    return _merge(stage, change.get(stage.get("kind", ""), {}), origin, max(0, written - 1), ("stages", stage["name"]))


def _explain(
    table: dict[str, Any], origin: str, layers: Sequence[Layer], problems: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    for problem in problems:
        # pydantic puts the discriminator's tag into the path; a reader of the recipe never wrote it
        path = _named(table, _written(problem["loc"]))
        key = ".".join(map(str, path))
        # what is missing was written by nobody: then whoever wrote the table that lacks it
        wrote = path[:-1] if problem["type"] == "missing" else path
        place = next((name for name, written, _ in reversed(layers) if wrote and _has(written, wrote)), origin)
        if problem["type"] == "extra_forbidden":
            word, known = str(path[-1]), _known_keys(problem["loc"])
            near = [ELSEWHERE[word]] if ELSEWHERE.get(word) in known else difflib.get_close_matches(word, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{place}: unknown key {key!r}{hint}"
        elif problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
            yield f"{place}: {key}: needs kind = {', '.join(map(repr, sorted(KINDS)))}"
        elif problem["type"] == "missing":
            advice = "; a part of a recipe is laid over a whole one: name that one first" if key == "model" else ""
            yield f"{place}: {key} is missing{advice}"
        elif problem["type"] in ("model_type", "dict_type"):
            yield f"{place}: {key} must be a table of keys and values"
        elif problem["type"] == "list_type":
            how = f"[[{key}]]" if isinstance(problem["input"], dict) else "[…]"
            yield f"{place}: {key} must be a list; write {how}"
        elif problem["type"] == "string_too_short":
            yield f"{place}: {key} is empty; give it a value, or leave it out"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{place}: {key}: {message}"


def _written(loc: Sequence[int | str]) -> list[int | str]:
    tagged = len(loc) > 2 and loc[0] == "stages" and loc[2] in KINDS
    return [*loc[:2], *loc[3:]] if tagged else list(loc)


def _named(table: dict[str, Any], path: Sequence[int | str]) -> list[int | str]:
    """The path with a stage's name in place of its number."""
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int):
        return ["stages", table["stages"][path[1]].get("name", path[1]), *path[2:]]
    return list(path)


def _has(table: Any, path: Sequence[int | str]) -> bool:
    """Whether a file or override wrote something at this path."""
    for place, part in enumerate(path):
        if place == 1 and path[0] == "stages" and isinstance(table, list):
            table = {stage.get("name"): stage for stage in table}
        if isinstance(table, list) and isinstance(part, int):
            table = table[part] if part < len(table) else None
        elif isinstance(table, dict) and part in table:
            table = table[part]
        else:
            return False
    return True


def _known_keys(loc: Sequence[int | str]) -> list[str]:
    current: type[Table] | None = Recipe
    for place, part in enumerate(loc[:-1]):
        if place == 2 and loc[0] == "stages" and part in KINDS:
            current = KINDS[str(part)]
            continue
        if current is None or isinstance(part, int):
            continue
        found = current.model_fields.get(str(part))
        current = _table_of(found.annotation) if found else current
    return list(current.model_fields) if current else []


def _table_of(annotation: Any) -> type[Table] | None:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _table_of(argument)) is not None:
            return found
    return None
