"""A slot: a named table of interchangeable components, filled by the modules of one package."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

Component = TypeVar("Component")


def unknown(what: str, name: object, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not in `allowed`: says the nearest one and lists them all."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"unknown {what} {name!r}{hint}; allowed: {', '.join(names)}")


def one_of(what: str, name: str, allowed: Iterable[str]) -> None:
    """Raise `ValueError` unless `name` is one of `allowed`."""
    names = tuple(allowed)
    if name not in names:
        raise unknown(what, name, names)


def at_least(what: str, component: object, least: int, names: Iterable[str]) -> None:
    """Raise `ValueError` naming the first of these fields that is no whole number of at least so much."""
    for name in names:
        value = getattr(component, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{what} {name} must be a whole number of at least {least}, got {value!r}")


def pair(what: str, value: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) from an int (a square) or two ints; JSON and TOML give lists."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{what} must be a positive int or [height, width], got {value!r}")
    return sides


def token_id(what: str, value: object) -> None:
    """Raise `ValueError` unless it is a token id, or None."""
    if value is not None and not isinstance(value, int):
        raise ValueError(f"{what} must be a token id, got {value!r}")


def token_pair(what: str, value: Iterable[int] | None) -> tuple[int, int] | None:
    """Two token ids, or None; JSON and TOML give lists."""
    if value is None:
        return None
    pair_of = tuple(value)
    if len(pair_of) != 2 or not all(isinstance(token, int) for token in pair_of):
        raise ValueError(f"{what} needs two token ids, got {value!r}")
    return pair_of


def three(what: str, value: Iterable[float]) -> tuple[float, float, float]:
    """A number for each colour channel; JSON and TOML give lists."""
    channels = tuple(float(channel) for channel in value)
    if len(channels) != 3:
        raise ValueError(f"{what} needs three numbers, got {channels}")
    return channels


def colour(what: str, value: Iterable[int]) -> tuple[int, int, int]:
    """(red, green, blue), each 0 to 255; JSON and TOML give lists."""
    channels = tuple(value)
    if len(channels) != 3 or not all(isinstance(channel, int) and 0 <= channel <= 255 for channel in channels):
        raise ValueError(f"{what} must be [red, green, blue] of 0 to 255, got {value!r}")
    return channels


class Slot(Generic[Component]):
    """`{"type": name, **settings}` -> component. A component is a frozen dataclass with a class attribute `type`;
    its fields are the settings a recipe may write. Every module of `package` is imported before the first look-up,
    so a new component is one new file there and nothing else changes.
    """

    def __init__(self, name: str, package: str) -> None:
        self.name = name
        self._package = package
        self._classes: dict[str, type[Component]] = {}
        self._discovered = False

    def register(self, cls: type[Component]) -> type[Component]:
        """Class decorator: enter `cls` under its `type`."""
        kind: str = cls.type  # type: ignore[attr-defined]
        if kind in self._classes:
            raise ValueError(f"{self.name} {kind!r} is defined twice: {self._classes[kind]} and {cls}")
        self._classes[kind] = cls
        return cls

    def types(self) -> tuple[str, ...]:
        """Names of all components of this slot."""
        self._discover()
        return tuple(sorted(self._classes))

    def find(self, settings: Mapping[str, Any]) -> type[Component]:
        """The class that `settings` names. Raises `ValueError` on an unknown type."""
        self._discover()
        if "type" not in settings:
            raise ValueError(f"{self.name} needs a 'type'; allowed: {', '.join(self.types())}")
        if settings["type"] not in self._classes:
            raise unknown(f"{self.name} type", settings["type"], self._classes)
        return self._classes[settings["type"]]

    def make(self, settings: Mapping[str, Any]) -> Component:
        """The component that `settings` names. Raises `ValueError` on an unknown type or key."""
        cls, given = self.find(settings), dict(settings)
        kind = given.pop("type")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in given:
            if key not in fields:
                raise unknown(f"{self.name}.{kind} key", key, ["type", *fields])
        for key, field in fields.items():
            if key not in given and field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{self.name}.{kind} needs {key!r}; its keys are: {', '.join(fields)}")
        return cls(**given)

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._discovered = True


def laid_over(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A component's table with other values; one of another type replaces it, and `{ remove = true }` empties it."""
    if over.get("remove") is True:
        return {}
    return dict(over) if over.get("type", table.get("type")) != table.get("type") else {**table, **over}


def settings(component: Any) -> dict[str, Any]:
    """The plain dict that `Slot.make` turns back into an equal component: JSON-safe, every default spelt out."""
    fields = {field.name: getattr(component, field.name) for field in dataclasses.fields(component)}
    return {"type": component.type} | {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
