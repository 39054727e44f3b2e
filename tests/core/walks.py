"""Which files of the package a value goes through, traced in a real call.

A file is *entered* when a function of it is called with the value, or with what was made of it, among its
arguments. Made of it is what a function returns, or a class constructs, that was given the value; what holds
it (a tuple, a dict, an object's attribute, a closure) counts as the value itself. Numbers, names and other
constants cannot be followed. A file *comes back* when it is entered while it and, above it, another file of
the package stand on the call stack.
"""

from __future__ import annotations

import enum
import functools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torchtitan_tp_validate

PACKAGE = Path(torchtitan_tp_validate.__file__).parent
MAP = PACKAGE.parent / "docs" / "architecture.md"
_CONSTANTS = (type(None), bool, int, float, enum.Enum, type, ModuleType)


@dataclass
class Walk:
    """What became of a value.

    Attributes:
        files: those of the package that were entered, in the order in which they first were.
        back: ``outer > ... > inner: function`` wherever a file came back.
    """

    files: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)


def walk(
    call: Callable[[], Any],
    is_value: Callable[[str, Any], bool],
    *,
    until: Callable[..., Any] | None = None,
    without: tuple[Callable[..., Any], ...] = (),
) -> Walk:
    """Return the walk that a value takes in ``call``, which must do all its imports beforehand.

    Args:
        call: raises nothing that the caller does not expect.
        is_value: whether an argument, or an attribute, of this name is the value.
        until: the function at which the walk ends.
        without: functions at which other walks begin: what they call is left out.
    """
    tracer = _Tracer(is_value, until and until.__code__, {function.__code__ for function in without})
    sys.setprofile(tracer)
    try:
        call()
    finally:
        sys.setprofile(None)
    return tracer.walk


def in_the_map(value: str) -> list[str]:
    """Return the walk of a value that docs/architecture.md draws, indented below its name."""
    (drawn,) = re.findall(
        rf"^{re.escape(value)} *\n((?:    .*\n)+)", MAP.read_text("utf-8"), flags=re.MULTILINE
    )
    return re.findall(r"[\w/]+\.py", drawn)


class _Tracer:
    def __init__(
        self, is_value: Callable[[str, Any], bool], until: CodeType | None, without: set[CodeType]
    ) -> None:
        self.walk = Walk()
        self._is_value = is_value
        self._until = until
        self._without = without
        self._left_out = 0
        self._stack: list[tuple[FrameType, list[int] | None]] = []  # what an entered function was given
        self._made: dict[int, Any] = {}  # by identity, and kept alive so that it stays unique

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if event == "call":
            self._left_out += frame.f_code in self._without
            if frame.f_code is self._until:
                sys.setprofile(None)
            else:
                self._called(frame)
        elif event == "return" and self._stack and self._stack[-1][0] is frame:
            _, given = self._stack.pop()
            # What is handed back as it came was not made here.
            if given is not None and id(result) not in given:
                self._keep(result)
            self._left_out -= frame.f_code in self._without

    def _called(self, frame: FrameType) -> None:
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        given = {name: frame.f_locals[name] for name in code.co_varnames[:count] if name in frame.f_locals}
        entered = not self._left_out and any(
            self._is_value(called, part) or id(part) in self._made
            for name, value in given.items()
            for called, part in ((name, value), *_parts(value))
        )
        self._stack.append((frame, [id(value) for value in given.values()] if entered else None))
        if not entered:
            return
        for name, value in given.items():
            if self._is_value(name, value):
                self._keep(value)
        if code.co_name == "__init__":
            self._keep(next(iter(given.values())))
        file = _file(frame)
        if file is not None:
            if file not in self.walk.files:
                self.walk.files.append(file)
            self._note_return(frame, file)

    def _note_return(self, frame: FrameType, file: str) -> None:
        stack = [file for above, _ in self._stack if (file := _file(above)) is not None]
        stack = [file for position, file in enumerate(stack) if stack[position - 1 : position] != [file]]
        if file in stack[:-1]:
            self.walk.back.append(f"{' > '.join(stack)}: {frame.f_code.co_name}")

    def _keep(self, value: Any) -> None:
        # Of texts only sentences: a name may be anybody's constant.
        if not isinstance(value, _CONSTANTS) and not (isinstance(value, str) and " " not in value):
            self._made[id(value)] = value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds, one level deep, with its name where it has one."""
    held: dict[Any, Any] = {}
    if isinstance(value, dict):
        held = value
    elif isinstance(value, (tuple, list, set, frozenset)):
        held = dict(enumerate(value))
    elif isinstance(value, functools.partial):
        held = {**dict(enumerate(value.args)), **value.keywords, "func": value.func}
    elif isinstance(value, MethodType):
        held = {"self": value.__self__}
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in cells if "empty" not in repr(cell)}
    elif not isinstance(value, _CONSTANTS):
        held = dict(getattr(value, "__dict__", {}))
    yield from ((str(name), part) for name, part in held.items())


@functools.cache
def _relative(name: str) -> str | None:
    path = Path(name)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def _file(frame: FrameType) -> str | None:
    return _relative(frame.f_code.co_filename)
