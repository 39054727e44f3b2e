"""Files that people hand over: read to the end, and written whole, or refused with the reason."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from torchtitan_tp_validate.errors import TPValidateError, UnreadableError

STDIN = "-"
"""What stands for standard input where a file is named."""

_MOST_BYTES = 16 * 2**20
_OPEN_ALREADY = ("/dev/", "/proc/")
"""Where names stand for what a process has open, be it a file: that one is added to."""
_NEVER_WAIT = getattr(os, "O_NONBLOCK", 0)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def visible(text: str) -> str:
    """Return the text with what does not print (control characters, bidi marks, line breaks) spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(path: str) -> str:
    """Return what to call a file in a message."""
    return "standard input" if path == STDIN else visible(path)


def read_json(path: str) -> tuple[dict[str, Any], str]:
    """Return the object in a JSON file, and the file's text.

    Args:
        path: of the file, or `STDIN`.

    Raises:
        UnreadableError: it is not there, or is something else.
    """
    import json

    return _parse(path, json.loads, "JSON")


def read_toml(path: str) -> tuple[dict[str, Any], str]:
    """Return the tables of a TOML file, and the file's text.

    Raises:
        UnreadableError: it is not there, or is something else.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found,no-redef]

    return _parse(path, tomllib.loads, "TOML")


def line_of(text: str, word: str) -> int | None:
    """Return the first line, counted from 1, that has the word; None when there is none."""
    position = text.find(word)
    return None if position < 0 else text.count("\n", 0, position) + 1


def check_not_an_input(target: str | None, inputs: Iterable[str]) -> None:
    """Refuse to write a result over what it is about, by whatever name or link.

    Raises:
        UnreadableError: the target is one of the inputs.
    """
    if target is None:
        return
    try:
        written = os.stat(target)
    except (OSError, ValueError):  # a new file, or what cannot be written either
        return
    for path in inputs:
        try:
            read = os.stat(path) if path != STDIN else os.fstat(sys.stdin.fileno())
        except (OSError, ValueError, AttributeError):  # judging says what is wrong with it
            continue
        if stat.S_ISREG(read.st_mode) and os.path.samestat(written, read):
            other = "" if path == target else f", which is the same file as {shown(path)}"
            raise UnreadableError(
                f"--output-file {shown(target)} would overwrite an input{other}: nothing was judged or "
                "written. Name another file."
            )


@contextlib.contextmanager
def replacing(path: str) -> Iterator[TextIO]:
    """Give a stream for a result, which is written whole or not at all: until then the file is what it was.

    What is no regular file (``/dev/stdout``, a pipe) is written to as it is.

    Raises:
        UnreadableError: it cannot be written.
    """
    try:
        target = os.path.realpath(path)  # a link stays one
        mode = os.stat(target).st_mode if os.path.exists(target) else None
        as_it_is = os.path.abspath(path).startswith(_OPEN_ALREADY) or not (mode is None or stat.S_ISREG(mode))
        with open(path, "a", encoding="utf-8") if as_it_is else _replacement(target, mode) as stream:
            yield stream
    except TPValidateError:  # of whoever writes
        raise
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{shown(path)} cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def _replacement(target: str, mode: int | None) -> Iterator[TextIO]:
    import tempfile

    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(13, "Permission denied")  # replacing it would not even notice
    folder, name = os.path.split(target)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name[:100]}.")
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            yield stream
        os.chmod(temporary, _new_mode() if mode is None else stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _new_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _parse(path: str, parse: Callable[[str], Any], language: str) -> tuple[dict[str, Any], str]:
    text = _text(path, language)
    try:
        content = parse(text)
    except RecursionError:
        raise UnreadableError(f"{shown(path)} is not read: its {language} is nested too deeply.") from None
    except ValueError as error:  # what both parsers raise, and int() for thousands of digits
        message = f"{shown(path)} is not valid {language}: {reason(error)}"
        raise UnreadableError(message, text=text) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UnreadableError(f"{shown(path)} holds a {language} {kind}, not an object of names.", text=text)
    return content, text


def _text(path: str, language: str) -> str:
    try:
        content = b"".join(_chunks(path))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        missing = isinstance(error, FileNotFoundError)
        raise UnreadableError(f"{shown(path)} cannot be read: {reason(error)}", missing=missing) from error
    if len(content) > _MOST_BYTES:
        raise UnreadableError(f"{shown(path)} is not read: it is larger than {_MOST_BYTES >> 20} MiB.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"{shown(path)} is not valid {language}: it is not UTF-8 text ({error})."
        ) from error


def _chunks(path: str) -> Iterator[bytes]:
    if path == STDIN:
        if sys.stdin is None:
            raise OSError("it is closed")
        yield sys.stdin.buffer.read(_MOST_BYTES + 1)
        return
    # Asked before it is opened, since a device may act on that, and a pipe wait for its other end.
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "something else")
        pipe = " (to read from a pipe, name - and pipe it to standard input)" if kind == stat.S_IFIFO else ""
        raise OSError(f"it is {what}, not a regular file{pipe}")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NEVER_WAIT)) as file:
        yield file.read(_MOST_BYTES + 1)


def reason(error: Exception) -> str:
    """Return why a file cannot be read or written, as the end of a sentence."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}."
    text = str(error).partition("\n")[0]
    return visible(text if text.endswith(".") else f"{text}.")
