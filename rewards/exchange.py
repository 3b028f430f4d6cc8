"""What runs in two sandboxes, joined by a socket: a program in one, its tests in the other. Standard library only.

    tests ──call, attribute, item──▶ program          what the program answers is data, copied: numbers, text, bytes,
          ◀──data, or a number that──                 lists, dicts, sets …; of anything else the tests hold a `Far`,
             stands for an object                     and whatever is done with it is asked of the program

So tests judge in a process that the program never enters: it can end its own, print what it likes, patch `unittest` or
return an object that says it equals everything, and has passed nothing. What stays the program's word: whether two
objects of its own classes are equal, or in order; what becomes of a list, dict or set that a test hands it; what its
functions say where a test calls them to judge with (`assert valid(solve(x))`). Not possible: to make a subclass of the
program's classes, or to hand it objects of the tests' own.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import operator
import os
import sys
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

MODULE = "solution"  # by which tests may import the program
# of a class of the program's that extends one, the value itself
SCALARS: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__}
SEQUENCES: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set, frozenset, deque)}
SHOWN, TOLD = 150, 2000  # characters of a value in a reason; of a reason, or of a test's words
WRITTEN: dict[str, type] = {kind.__name__: kind for kind in (complex, Decimal, Fraction)}  # as text
COMPARING = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
COMBINING = ("__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__", "__matmul__")
LOOKING: dict[str, Callable[..., Any]] = {
    "__len__": len,
    "__iter__": iter,
    "__next__": next,
    "__str__": str,
    "__repr__": repr,
    "__bool__": bool,
    "__abs__": abs,
    "__neg__": operator.neg,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
}
SPECIAL = {**LOOKING, **{name: getattr(operator, name) for name in (*COMPARING, *COMBINING)}}


class Ended(Exception):  # noqa: N818 - of the other end
    """The other end is gone."""


class Far:
    """An object of the other end."""

    __slots__ = ("_end", "_number")
    _end: End
    _number: int

    def __init__(self, end: End, number: int) -> None:
        object.__setattr__(self, "_end", end)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result, after = self._end.ask("call", self, list(args), kwargs)
        for mine, theirs in zip(args, after, strict=True):  # what it did to its arguments
            if isinstance(mine, list):
                mine[:] = theirs
            elif isinstance(mine, dict | set):
                mine.clear()
                mine.update(theirs)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._end.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._end.ask("set", self, name, value)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Far) and bool(self._end.ask("isinstance", instance, self))

    def __hash__(self) -> int:
        return hash(self._number)


def _special(name: str) -> Callable[..., Any]:
    def method(self: Far, *others: Any) -> Any:
        # data is compared here: an object of the program's has no say in whether it equals a number
        if name not in LOOKING and not isinstance(others[0], Far):
            return NotImplemented
        return self._end.ask("special", name, self, *others)

    return method


for _name in SPECIAL:
    setattr(Far, _name, _special(_name))


class End:
    """One end of the conversation. `open_handed`: whether the other may do with an object that it knows whatever the
    conversation has words for, or only call it."""

    def __init__(self, descriptor: int, *, open_handed: bool) -> None:
        self._in, self._out = os.fdopen(descriptor, "rb"), os.fdopen(os.dup(descriptor), "wb")
        self._open_handed = open_handed
        self._shown = list[Any]()  # objects of this end, by the numbers that the other knows
        self._numbers = dict[int, int]()
        self._seen = dict[int, Any]()  # of the other, by number: one Far, or one class of errors, for each

    def ask(self, what: str, *values: Any) -> Any:
        """The other's answer; what it raises is raised here, as the nearest built-in exception or a class of it."""
        self.send([what, [self.encoded(value) for value in values]])
        while True:
            word, content = self.heard()
            if word == "value":
                return self.decoded(content)
            if word == "raise":
                kind, message = self.decoded(content[0]), str(content[1])
                raise _error(kind, message)
            self._do(word, content)  # a function of ours that the other was given

    def serve(self) -> None:
        """Do what is asked until the other end is gone."""
        with contextlib.suppress(Ended):
            while True:
                self._do(*self.heard())

    def _do(self, what: str, content: list[Any]) -> None:
        try:
            said = ["value", self.encoded(self._done(what, [self.decoded(value) for value in content]))]
        except Ended:
            raise
        except BaseException as error:  # noqa: BLE001 - code of the program's: exits are errors of the call too
            said = ["raise", [self.encoded(type(error)), _text(error)]]
        self.send(said)

    def _done(self, what: str, values: list[Any]) -> Any:
        if what == "call":
            function, args, kwargs = values
            if not self._open_handed and not any(function is one for one in self._shown):
                raise PermissionError("the program may call the functions that it was given")
            result = function(*args, **kwargs)
            return result, [value if isinstance(value, list | dict | set) else None for value in args]
        if not self._open_handed:
            raise PermissionError("the program may call the functions that it was given, nothing else")
        match what, values:
            case "get", [of, name]:
                return getattr(of, name)
            case "set", [of, name, value]:
                return setattr(of, name, value)
            case "isinstance", [of, kind]:
                return isinstance(of, kind)
            case "special", [name, *of]:
                return SPECIAL[name](*of)
        raise ValueError(f"nobody can {what!r}")

    # -- messages: one line of JSON each, whose lists begin with what they are

    def send(self, message: list[Any]) -> None:
        try:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()
        except OSError as error:
            raise Ended("the program ended before its tests did") from error

    def heard(self) -> tuple[str, Any]:
        try:
            line = self._in.readline()
        except OSError as error:
            raise Ended("the program ended before its tests did") from error
        if not line:
            raise Ended("the program ended before its tests did")
        word, content = json.loads(line)
        return word, content

    def encoded(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        for scalar, plain in SCALARS.items():
            if isinstance(value, scalar):
                return plain(value)
        if isinstance(value, Far):
            return ["yours", value._number]
        kind = type(value)
        if kind.__module__ != MODULE or hasattr(kind, "_fields"):  # not classes of the program's that only extend these
            for name, sequence in SEQUENCES.items():
                if isinstance(value, sequence):
                    return [name, *map(self.encoded, value)]
            if isinstance(value, dict):
                return ["dict", *([self.encoded(key), self.encoded(one)] for key, one in value.items())]
            if isinstance(value, bytes | bytearray):
                return ["bytes", bytes(value).hex()]
            if isinstance(value, range):
                return ["range", value.start, value.stop, value.step]
            if kind.__name__ in WRITTEN and isinstance(value, WRITTEN[kind.__name__]):
                return [kind.__name__, str(value)]
        if isinstance(value, type):
            bases = [one.__name__ for one in value.__mro__ if vars(builtins).get(one.__name__) is one]
            if bases[0] == value.__name__:
                return ["builtin", value.__name__]
            if issubclass(value, BaseException):
                return ["error", self._number(value), value.__name__, bases[0]]
        if not self._open_handed and not callable(value):
            raise TypeError(f"a test cannot hand a {kind.__name__} to the program, only data and functions")
        return ["mine", self._number(value)]

    def _number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._shown)
            self._shown.append(value)
        return self._numbers[id(value)]

    def decoded(self, said: Any) -> Any:
        if not isinstance(said, list):
            return said
        kind, *rest = said
        if kind in SEQUENCES:
            return SEQUENCES[kind](map(self.decoded, rest))
        if kind in WRITTEN:
            return WRITTEN[kind](rest[0])
        match kind, rest:
            case "dict", pairs:
                return {self.decoded(key): self.decoded(value) for key, value in pairs}
            case "bytes", [text]:
                return bytes.fromhex(text)
            case "range", [int(start), int(stop), int(step)]:
                return range(start, stop, step)
            case "builtin", [name] if isinstance(found := vars(builtins)[name], type):
                return found
            case "yours", [number]:
                return self._shown[number]
            case "mine", [number]:
                return self._seen.setdefault(number, Far(self, number))
            case "error", [number, name, base] if issubclass(found := vars(builtins)[base], BaseException):
                return self._seen.setdefault(number, type(name, (found,), {}))
        raise ValueError(f"the other end sent {kind!r}")


def _error(kind: Any, message: str) -> Exception:
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # some need more than a message
            return kind(message)
    return RuntimeError(f"{getattr(kind, '__name__', kind)}: {message}")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a class of the program's
        return ""


def serve(descriptor: int, program: str) -> None:
    """The program's side: run it as a module, say what it defines, then do what the tests ask."""
    sys.set_int_max_str_digits(0)
    end, module = End(descriptor, open_handed=True), types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    try:
        exec(compile(program, f"{MODULE}.py", "exec"), module.__dict__)  # noqa: S102 - what the sandbox is for
    except BaseException:  # noqa: BLE001 - of the program, which may also exit
        end.send(["raise", ["RuntimeError", _traceback()]])
        return
    named = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    end.send(
        ["value", end.encoded({name: one for name, one in named.items() if not isinstance(one, types.ModuleType)})]
    )
    end.serve()


def examine(descriptor: int, tests: list[str], entry: str) -> None:
    """The tests' side. Prints a line of JSON for each test, [name, why it failed or ""], before them their number, or
    instead of all the reason why there is no program: {"broken": …}.

    `tests` are sources, run in order in one namespace that has the program's names (also as module `solution`). A test
    is: each assert outside functions; each function test_…; each method test_… of a class at the top; `check(entry)`
    where they define check and `entry` names something of the program's; a source without any of these, as a whole.
    """
    sys.set_int_max_str_digits(0)
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what tests print is no verdict

    def say(what: object) -> None:
        print(json.dumps(what), file=report, flush=True)

    def told(name: str, fault: str) -> None:
        say([name[:TOLD], fault[:TOLD]])  # as long as they please: what is printed has a limit

    end = End(descriptor, open_handed=False)
    word, content = end.heard()
    if word == "raise":
        say({"broken": str(content[1])[-TOLD:]})
        return
    # What tests call by a built-in name is the built-in, whatever the program calls by that name. The message may be
    # the program's own, too: "__builtins__" would replace them all.
    names = {
        name: one
        for name, one in end.decoded(content).items()
        if name.isidentifier() and not name.startswith("__") and name not in vars(builtins)
    }
    module = sys.modules[MODULE] = types.ModuleType(MODULE)
    vars(module).update(names)
    space = vars(types.ModuleType("tests"))
    space.update(names)
    parsed = [ast.parse(source) for source in tests]
    say(sum(len(list(counted(tree, entry))) for tree in parsed))
    for tree in parsed:
        own = list(counted(tree, entry))
        setup = ""  # why what comes before the test failed
        for statement in tree.body:
            is_test = isinstance(statement, ast.Assert)
            if setup and not is_test:
                continue
            fault = setup or _tried(_execute, statement, space)
            if is_test:
                told(ast.unparse(statement), fault)
            else:
                setup = fault
        for name in own:
            if name != "assert":
                told(name or "the test", setup or (_tried(_called, name, space, entry) if name else ""))


def counted(tree: ast.Module, entry: str) -> Iterator[str]:
    """The tests of a source: "assert" for each of those, names of functions and of class.method; "" for all of it."""
    found = False
    for node in tree.body:
        if isinstance(node, ast.Assert):
            found = True
            yield "assert"
        elif isinstance(node, ast.FunctionDef) and (node.name.startswith("test") or (node.name == "check" and entry)):
            found = True
            yield node.name
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name.startswith("test"):
                    found = True
                    yield f"{node.name}.{method.name}"
    if not found:
        yield ""


def _execute(statement: ast.stmt, space: dict[str, Any]) -> None:
    match statement:
        case ast.Assert(ast.Compare(left, [ast.Eq()], [right]), None):  # as it stands, but it can say what it found
            got, expected = (
                eval(compile(ast.Expression(side), "tests.py", "eval"), space)  # noqa: S307 - as below
                for side in (left, right)
            )
            if not got == expected:
                raise AssertionError(f"expected {expected!r:.{SHOWN}}, got {got!r:.{SHOWN}}")
            return
    exec(compile(ast.Module([statement], []), "tests.py", "exec"), space)  # noqa: S102 - what the sandbox is for


def _called(name: str, space: dict[str, Any], entry: str) -> None:
    kind, _, method = name.partition(".")
    cases: Any = sys.modules.get("unittest")  # not imported here: a third of what a start takes
    if name == "check":
        space["check"](space[entry])
    elif not method:
        space[name]()
    elif cases and issubclass(space[kind], cases.TestCase):
        space[kind](method).debug()  # with its setUp and tearDown; raises what it finds
    else:
        getattr(space[kind](), method)()


def _tried(test: Callable[..., None], *given: Any) -> str:
    """Why it failed; "" where it did not."""
    try:
        test(*given)
    except BaseException as error:  # noqa: BLE001 - a test fails by any exception, exits too
        return f"{type(error).__name__}: {_text(error)}".removesuffix(": ")
    return ""


def _traceback() -> str:
    return traceback.format_exc(limit=-2)
