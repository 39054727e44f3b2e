"""Files that people hand over: read to the end as what they should be, or refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.errors import TPValidateError

_MOST_BYTES = 16 * 2**20


class UnreadableError(TPValidateError):
    """A file cannot be read as what it should be; the text names it."""


def read_json(path: str) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and the file's text.

    Raises:
        UnreadableError: it is not there, or is something else.
    """
    import json

    return _parse(path, json.loads, "JSON")


def read_toml(path: str) -> tuple[dict[str, Any], str]:
    """The tables of a TOML file, and the file's text.

    Raises:
        UnreadableError: it is not there, or is something else.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found,no-redef]

    return _parse(path, tomllib.loads, "TOML")


def line_of(text: str, word: str) -> int | None:
    """The first line, counted from 1, that has the word; None when there is none."""
    position = text.find(word)
    return None if position < 0 else text.count("\n", 0, position) + 1


def write(path: str, text: str) -> None:
    """Write a result.

    Raises:
        UnreadableError: it cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path} cannot be written: {_reason(error)}") from error


def _parse(path: str, parse: Callable[[str], Any], language: str) -> tuple[dict[str, Any], str]:
    text = _text(path, language)
    try:
        content = parse(text)
    except RecursionError:
        raise UnreadableError(f"{path} is not read: its {language} is nested too deeply.") from None
    except ValueError as error:  # what both parsers raise, and int() for thousands of digits
        raise UnreadableError(f"{path} is not valid {language}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UnreadableError(f"{path} holds a {language} {type(content).__name__}, not an object of names.")
    return content, text


def _text(path: str, language: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UnreadableError(f"{path} cannot be read: {_reason(error)}") from error
    if len(content) > _MOST_BYTES:
        raise UnreadableError(f"{path} is not read: it is larger than {_MOST_BYTES >> 20} MiB.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path} is not valid {language}: it is not UTF-8 text ({error}).") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}."
    text = str(error).partition("\n")[0]
    return text if text.endswith(".") else f"{text}."
