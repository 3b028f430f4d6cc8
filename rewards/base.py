"""What a reward function is, how it is found by name, and how its failures are kept apart from its zeros."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rlhf.types import Group, Prompt, Score


class RewardError(ValueError):
    """A reward that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Item:
    """One answered prompt: the completion's text without the end token, its length in tokens, and whether the model
    ended it itself (False: cut off)."""

    prompt: Prompt
    completion: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class Reward:
    """A reward function found by name. style "item": fn(item) -> float | Score; "batch": TRL's
    fn(prompts, completions, **columns) -> list[float]. file: where its code was found."""

    name: str
    function: Callable[..., Any]
    style: Literal["item", "batch"]
    file: str


def items_of(group: Group) -> list[Item]:
    """The rollouts of a group as items, in order."""
    return [Item(group.prompt, r.text, len(r.token_ids), r.finish == "stop") for r in group.rollouts]


def resolve(name: str) -> Reward:
    """Find "module:function" or "path/file.py:function". Raises RewardError: no such module, file or function, or a
    signature that is neither ours (one parameter) nor TRL's (a parameter `completions`)."""
    place, _, function_name = name.rpartition(":")
    if not place or not function_name:
        raise RewardError(f'reward {name!r}: write "module:function" or "path/file.py:function"')
    module = _load_file(name, Path(place)) if place.endswith(".py") else _import(name, place)
    # getattr: packages that load lazily (trl.rewards) do not list their functions
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise RewardError(
            f"reward {name!r}: {place} has no function {function_name!r}; it has {', '.join(own) or 'none'}"
        )
    return Reward(name, function, _style(name, function), str(module.__file__))


def file_of(name: str) -> Path | None:
    """The file a reward function is written in, found without running it; None where there is none to be found."""
    place, _, _ = name.rpartition(":")
    if place.endswith(".py"):
        return Path(place)
    top, *inner = place.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # an empty name, or a module without a specification
        return None
    for part in inner:  # find_spec of a dotted name would run the packages on its way
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def evaluate(reward: Reward, items: Sequence[Item]) -> list[Score]:
    """One Score an item, in order. An exception, a number that is not finite, or None is outcome "failed" with the
    reason in `note`; it never becomes a 0. A batch that raises is asked again item by item."""
    if reward.style == "item":
        return [_guarded(lambda item=item: _score(reward.function(item))) for item in items]  # type: ignore[misc]
    if not items:
        return []
    try:
        return _batch(reward, items)
    # the boundary to code that is not ours: whatever it raises is the reward's failure, and is reported as such
    except Exception:  # noqa: BLE001
        return [_guarded(lambda item=item: _batch(reward, [item])[0]) for item in items]  # type: ignore[misc]


def _guarded(call: Callable[[], Score]) -> Score:
    try:
        return call()
    except Exception:  # noqa: BLE001
        return Score("failed", note="".join(traceback.format_exc().splitlines(keepends=True)[-4:]).strip())


def _score(said: Any) -> Score:
    if isinstance(said, Score):
        if said.outcome == "scored" and (said.value is None or not math.isfinite(said.value)):
            return Score("failed", note=f"a Score of outcome scored with value {said.value}")
        return said
    if said is None:
        return Score("failed", note="the reward returned None")
    value = float(said)
    if not math.isfinite(value):
        return Score("failed", note=f"the reward returned {value}")
    return Score("scored", value)


def _batch(reward: Reward, items: Sequence[Item]) -> list[Score]:
    """TRL's call: conversational prompts and completions, and each column as a list."""
    names = {name for item in items for name in item.prompt.columns}
    arguments: dict[str, Any] = {name: [item.prompt.columns.get(name) for item in items] for name in names}
    arguments["images"] = [[media.open() for media in item.prompt.media] for item in items]
    arguments["prompts"] = [[{"role": "user", "content": item.prompt.question}] for item in items]
    arguments["completions"] = [[{"role": "assistant", "content": item.completion}] for item in items]
    parameters = inspect.signature(reward.function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    said = list(reward.function(**arguments))
    if len(said) != len(items):
        raise RewardError(f"reward {reward.name!r} returned {len(said)} numbers for {len(items)} completions")
    return [_score(value) for value in said]


def _style(name: str, function: Callable[..., Any]) -> Literal["item", "batch"]:
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"reward {name!r} is async; make it an ordinary function, it has a process of its own")
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return "batch"
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind in positional]
    needed_by_name = [p for p in parameters.values() if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    if len(needed) == 1 and not needed_by_name:
        return "item"
    raise RewardError(
        f"reward {name!r}: the signature {inspect.signature(function)} is neither fn(item) nor "
        "fn(prompts, completions, **columns)"
    )


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(f"reward {name!r}: {module_name} cannot be imported ({error})") from error


def _load_file(name: str, path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise RewardError(f"reward {name!r}: no file {path}")
    # a name of its own for every path: two files called reward.py may live together
    module_name = f"reward_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise RewardError(f"reward {name!r}: {path} fails on import: {type(error).__name__}: {error}") from error
    return module
