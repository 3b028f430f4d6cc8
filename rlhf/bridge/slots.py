"""A slot of the bridge: a named table of interchangeable components, filled by the modules of one package."""

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


def pair(what: str, value: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) from an int (a square) or two ints; JSON and TOML give lists."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{what} must be a positive int or [height, width], got {value!r}")
    return sides


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

    def make(self, settings: Mapping[str, Any]) -> Component:
        """The component that `settings` names. Raises `ValueError` on an unknown type or key."""
        self._discover()
        given = dict(settings)
        if "type" not in given:
            raise ValueError(f"{self.name} needs a 'type'; allowed: {', '.join(self.types())}")
        kind = given.pop("type")
        if kind not in self._classes:
            raise unknown(f"{self.name} type", kind, self._classes)
        cls = self._classes[kind]
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in given:
            if key not in fields:
                raise unknown(f"{self.name}.{kind} key", key, ["type", *fields])
        for key, field in fields.items():
            if key not in given and field.default is dataclasses.MISSING:
                raise ValueError(f"{self.name}.{kind} needs {key!r}; its keys are: {', '.join(fields)}")
        return cls(**given)

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._discovered = True


def settings(component: Any) -> dict[str, Any]:
    """The plain dict that `Slot.make` turns back into an equal component: JSON-safe, every default spelt out."""
    fields = {field.name: getattr(component, field.name) for field in dataclasses.fields(component)}
    return {"type": component.type} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
