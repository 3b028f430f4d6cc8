"""What a reward function is, how it is found by name, and how its failures are kept apart from its zeros.

Three signatures, told apart by their parameters:

    fn(item) -> float | Score                                            ours
    fn(prompts, completions, **columns) -> list[float]                   TRL's
    compute_score(data_source, solution_str, ground_truth, extra_info)   verl's

Any of them may be `async`.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal, overload

from PIL import Image

from rlhf.types import Group, Media, Prompt, Score

GROUP = "rlhf.rewards"  # of entry points by which an installed package offers rewards
Style = Literal["item", "batch", "verl"]
TRL = ("prompts", "completions", "completion_ids")  # one of them, as a function needs
VERL = ("data_source", "solution_str", "ground_truth")


class RewardError(ValueError):
    """A reward that cannot be used; the message names it and says what to do."""


class Images(Sequence[Image.Image]):
    """Pictures of a prompt, each decoded to RGB when it is asked for."""

    def __init__(self, media: Sequence[Media]) -> None:
        self._media = media

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return Images(self._media[index])
        return self._media[index].open()

    def __len__(self) -> int:
        return len(self._media)


@dataclass(frozen=True)
class Item:
    """One answered prompt: the completion's text without the end token, its token ids with it, and whether the model
    ended it itself (False: cut off)."""

    prompt: Prompt
    completion: str
    token_ids: tuple[int, ...]
    finished: bool

    @property
    def question(self) -> str:
        """The user's words."""
        return self.prompt.question

    @property
    def columns(self) -> Mapping[str, Any]:
        """Every other column of the prompt's row."""
        return self.prompt.columns

    @property
    def images(self) -> Images:
        """What the prompt shows."""
        return Images(self.prompt.media)

    @property
    def num_tokens(self) -> int:
        """How long the completion is."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Reward:
    """A reward function found by name; awaited: it is async; file: where its code was found."""

    name: str
    function: Callable[..., Any]
    style: Style
    awaited: bool
    file: str


def items_of(group: Group) -> list[Item]:
    """The rollouts of a group as items, in order."""
    return [Item(group.prompt, r.text, r.token_ids, r.finish == "stop") for r in group.rollouts]


def resolve(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Find "module:function", "path/file.py:function", or the name of an entry point of group `rlhf.rewards`.

    `options` are keyword arguments of the function; or, where it is none of the three signatures, of a factory that
    returns one (TRL's `get_soft_overlong_punishment`). Raises RewardError: no such module, file, function or entry
    point, a signature that is none of the three, or options that it does not take.
    """
    if ":" in name:
        place, _, function_name = name.rpartition(":")
        if not place or not function_name:
            raise RewardError(f'reward {name!r}: write "module:function" or "path/file.py:function"')
        module = _load_file(name, Path(place)) if place.endswith(".py") else _import(name, place)
        # getattr: packages that load lazily (trl.rewards) do not list their functions
        function, file = getattr(module, function_name, None), str(module.__file__)
        if not callable(function):
            own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
            raise RewardError(
                f"reward {name!r}: {place} has no function {function_name!r}; it has {', '.join(own) or 'none'}"
            )
    else:
        function, file = _installed(name)
    options = options or {}
    style = style_of(function, options)
    if style is None and options:
        function, options = _made(name, function, options), {}
        style = style_of(function)
    if style is None:
        raise RewardError(
            f"reward {name!r}: the signature {inspect.signature(function)} is neither fn(item), nor TRL's "
            "fn(prompts, completions, **columns), nor verl's "
            "compute_score(data_source, solution_str, ground_truth, extra_info)"
        )
    if options:
        try:
            inspect.signature(function).bind_partial(**options)
        except TypeError as error:
            raise RewardError(f"reward {name!r}: options {dict(options)}: {error}") from error
        function = partial(function, **options)
    return Reward(name, function, style, _is_async(function), file)


def style_of(function: Callable[..., Any], options: Mapping[str, Any] = MappingProxyType({})) -> Style | None:
    """By which of the three signatures it is called, `options` being given by name; None: by none of them."""
    parameters = {key: p for key, p in inspect.signature(function).parameters.items() if key not in options}
    if any(name in parameters for name in TRL):
        return "batch"
    if all(name in parameters for name in VERL):
        return "verl"
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind in positional]
    needed_by_name = [p for p in parameters.values() if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    return "item" if len(needed) == 1 and not needed_by_name else None


def file_of(name: str) -> Path | None:
    """The file a reward function is written in, found without running it; None where there is none to be found."""
    if ":" not in name:
        found = entry_points(group=GROUP, name=name)
        return file_of(next(iter(found)).value) if found else None
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


def sources_of(path: Path) -> list[Path]:
    """A file of Python, and those beside it that it imports, and so on."""
    found, left = list[Path](), [path.resolve()]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.append(file)
        if file.suffix != ".py":  # compiled
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            beside = (file.with_name(f"{name.rpartition('.')[2]}.py") for name in names)
            left += [one for one in beside if one.is_file()]
    return sorted(found)


def evaluate(reward: Reward, items: Sequence[Item], now: Callable[[int], None] | None = None) -> list[Score]:
    """One Score an item, in order. An exception, a number that is not finite, or None is outcome "failed" with the
    reason in `note`; it never becomes a 0. A batch that raises is asked again item by item. `now` is told the place of
    each item as its turn comes, −1 where all have theirs at once."""
    now = now or (lambda _place: None)
    if not items:
        return []
    if reward.style == "batch":
        now(-1)
        try:
            return _batch(reward, items)
        # the boundary to code that is not ours: whatever it raises is the reward's failure, and is reported as such
        except Exception:  # noqa: BLE001
            return _in_turn(lambda item: _batch(reward, [item])[0], items, now)
    if reward.awaited:
        now(-1)
        return asyncio.run(_all_at_once(reward, items))
    return _in_turn(lambda item: _score(_call(reward, item)), items, now)


def _in_turn(score: Callable[[Item], Score], items: Sequence[Item], now: Callable[[int], None]) -> list[Score]:
    scores = list[Score]()
    for place, item in enumerate(items):
        now(place)
        try:
            scores.append(score(item))
        except Exception:  # noqa: BLE001 - the same boundary
            scores.append(_failed())
    return scores


async def _all_at_once(reward: Reward, items: Sequence[Item]) -> list[Score]:
    async def one(item: Item) -> Score:
        try:
            return _score(await _call(reward, item))
        except Exception:  # noqa: BLE001
            return _failed()

    return list(await asyncio.gather(*map(one, items)))


def _failed() -> Score:
    """With the end of the traceback of what is being handled."""
    return Score("failed", note="".join(traceback.format_exc().splitlines(keepends=True)[-4:]).strip())


def _call(reward: Reward, item: Item) -> Any:
    if reward.style == "item":
        return reward.function(item)
    columns = item.columns
    if "reward_model" in columns:  # as verl's own data sets have it
        truth = columns["reward_model"]["ground_truth"]
    else:
        truth = columns["ground_truth"] if "ground_truth" in columns else columns["answer"]
    given = {
        "data_source": columns.get("data_source", item.prompt.source),
        "solution_str": item.completion,
        "ground_truth": truth,
        "extra_info": {**columns, "images": item.images, **(columns.get("extra_info") or {})},
    }
    return reward.function(**_taken(reward.function, given))


def _taken(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the function has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _score(said: Any) -> Score:
    if isinstance(said, Score):
        if said.outcome != "scored":
            return Score("timed_out" if said.outcome == "timed_out" else "failed", note=str(said.note))
        if said.value is None or not math.isfinite(said.value):
            return Score("failed", note=f"a Score of outcome scored with value {said.value}")
        # anew: an object of the function's own would mean nothing to whoever reads it
        kept = {str(name): float(value) for name, value in said.parts.items()}
        return _finite(Score("scored", float(said.value), kept, str(said.note)))
    if said is None:
        return Score("failed", note="the reward returned None")
    parts: dict[str, float] = {}
    if isinstance(said, Mapping):  # verl's: a score, and what else is to be looked at
        parts = {key: float(value) for key, value in said.items() if key != "score" and isinstance(value, int | float)}
        said = said["score"]
    value = float(said)
    if not math.isfinite(value):
        return Score("failed", note=f"the reward returned {value}")
    return _finite(Score("scored", value, parts))


def _finite(score: Score) -> Score:
    wrong = next((f"{name} = {value}" for name, value in score.parts.items() if not math.isfinite(value)), None)
    return score if wrong is None else Score("failed", note=f"the reward returned a part {wrong}")


def _batch(reward: Reward, items: Sequence[Item]) -> list[Score]:
    """TRL's call: conversational prompts and completions, and each column as a list."""
    names = {name for item in items for name in item.columns}
    arguments: dict[str, Any] = {name: [item.columns.get(name) for item in items] for name in names}
    arguments["images"] = [item.images for item in items]
    arguments["prompts"] = [[{"role": "user", "content": item.question}] for item in items]
    arguments["completions"] = [[{"role": "assistant", "content": item.completion}] for item in items]
    arguments["completion_ids"] = [list(item.token_ids) for item in items]
    said = reward.function(**_taken(reward.function, arguments))
    values = list(asyncio.run(_awaited(said)) if reward.awaited else said)
    if len(values) != len(items):
        raise RewardError(f"reward {reward.name!r} returned {len(values)} numbers for {len(items)} completions")
    return [_guarded(value) for value in values]


async def _awaited(said: Awaitable[Any]) -> Any:
    return await said


def _guarded(value: Any) -> Score:
    """What one of a batch is worth, so that a value that is no number costs its own item alone."""
    try:
        return _score(value)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        return Score("failed", note=f"the reward returned {value!r:.200}: {error}")


def _is_async(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    own = getattr(function, "__call__", None)  # noqa: B004 - of an object, what calling it runs
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(own)


def _made(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """What a factory returns."""
    try:
        made = factory(**options)
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: options {dict(options)}: {type(error).__name__}: {error}; it takes "
            f"{inspect.signature(factory)}"
        ) from error
    if not callable(made):
        raise RewardError(f"reward {name!r} with options made a {type(made).__name__}, which is no function")
    return made  # type: ignore[no-any-return]


def _installed(name: str) -> tuple[Any, str]:
    """The function of an entry point, and its file."""
    found = entry_points(group=GROUP, name=name)
    if not found:
        known = ", ".join(sorted(entry.name for entry in entry_points(group=GROUP))) or "none"
        raise RewardError(
            f'reward {name!r}: write "module:function" or "path/file.py:function", or the name by which an installed '
            f"package offers one (entry points of group {GROUP!r}: {known})"
        )
    entry = next(iter(found))
    try:
        return entry.load(), str(file_of(entry.value))
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: {entry.value} cannot be imported ({type(error).__name__}: {error})"
        ) from error


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: {module_name} cannot be imported ({type(error).__name__}: {error})"
        ) from error


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
