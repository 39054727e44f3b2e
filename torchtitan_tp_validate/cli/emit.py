"""A run in another layout, written as torchtitan reads it: arguments, a TOML file or a config function."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torchtitan_tp_validate import registry
from torchtitan_tp_validate.cli import files
from torchtitan_tp_validate.cli.torchtitan import TOML_FLAGS, parsed, value_of
from torchtitan_tp_validate.errors import UsageError
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.search import Layout, Search

_Path = tuple[str, ...]
_ABSENT = object()
_MERGED = "Merged"
"""How 0.2.x names a class of its own that it has extended with a user's, each time that it parses."""


def raise_if_not_read(form: str) -> None:
    """Complain of a form that the installed torchtitan does not read.

    Raises:
        UsageError: 0.2.x has no config functions, 0.3.x no TOML files.
    """
    unread, what, other = (
        ("toml", "reads no TOML files", "recipe")
        if registry.has_configs()
        else ("recipe", "has no config functions", "toml")
    )
    if form == unread:
        release = torchtitan_identity().name
        raise UsageError(f"--emit {form}: torchtitan {release} {what}; choose {other} or cli.")


def emitted(form: str, arguments: Sequence[str], search: Search, layout: Layout, flags: Sequence[str]) -> str:
    """Return the text that has a run laid out so.

    Args:
        form: ``cli``, ``toml`` (0.2.x) or ``recipe`` (0.3.x).
        arguments: torchtitan's own, that were searched for.
        search: what found the layout.
        layout: the one to write.
        flags: the launcher's own that it needs.

    Raises:
        UsageError: the form cannot say what the arguments do, or takes a package that is not installed.
    """
    if form == "cli":
        others = _without(arguments, search.changes(layout))
        # First, since what follows a choice (activation-checkpoint:full) is about it alone.
        words = [*search.arguments(layout), *others, *flags]
        return f"{shlex.join(words)}\n"
    write = _toml if form == "toml" else _recipe
    by = f"; run by torchtitan_tp_validate.train with {shlex.join(flags)}" if flags else ""
    return write(arguments, search, layout, f"on {search.world_size} ranks, by tp-validate layouts{by}")


def _without(arguments: Sequence[str], changed: Mapping[str, int]) -> Iterator[str]:
    """Yield the arguments but for those that set some fields under ``[parallelism]``."""
    # torchtitan's parser takes a dash for an underscore.
    flags = {f"--parallelism.{field}".replace("-", "_") for field in changed}
    words = iter(arguments)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.replace("-", "_") not in flags:
            yield word
        elif not equals:
            next(words, None)


def _toml(arguments: Sequence[str], search: Search, layout: Layout, how: str) -> str:
    """Return the job's TOML file as it is, but for what its command line and the layout change."""
    try:
        import tomlkit
    except ModuleNotFoundError:
        raise UsageError(
            "--emit toml needs tomlkit: pip install tomlkit (or 'torchtitan-tp-validate[toml]')."
        ) from None
    file = value_of(arguments, TOML_FLAGS)
    document = tomlkit.parse("" if file is None else files.read_toml(file)[1])
    before, _ = parsed([] if file is None else [TOML_FLAGS[0], file])
    for path, value in _changes(before, search.job_in(layout)):
        *sections, name = path
        table: Any = document
        for section in sections:
            table = table.setdefault(section, tomlkit.table())
        if value is None:
            raise _unwritten(path)
        table[name] = value
    return f"# {how}\n{tomlkit.dumps(document)}"


def _recipe(arguments: Sequence[str], search: Search, layout: Layout, how: str) -> str:
    """Return a module with a function that takes the run's own config, and replaces what is changed."""
    module, config = value_of(arguments, ("--module",)), value_of(arguments, ("--config",))
    assert module is not None, "the run is parsed"
    before, _ = parsed(["--module", module, "--config", str(config)])
    tree: dict[str, Any] = {}
    for path, value in _changes(before, search.job_in(layout)):
        *sections, name = path
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = f'float("{value}")' if isinstance(value, float) and math.isinf(value) else repr(value)
    return f'''\
"""{config} {how}."""

from dataclasses import replace

from {registry.config_module(module).__name__} import {config}


def {config}_on_{search.world_size}():
    config = {config}()
    return {_replaced("config", tree, "    ")}
'''


def _replaced(config: str, changed: Mapping[str, Any], indentation: str) -> str:
    """Return the expression for a config with some fields replaced, and some of those below."""
    inner = f"{indentation}    "
    values = {
        name: value if isinstance(value, str) else _replaced(f"{config}.{name}", value, inner)
        for name, value in changed.items()
    }
    lines = [f"{inner}{name}={value},\n" for name, value in values.items()]
    return f"replace(\n{inner}{config},\n{''.join(lines)}{indentation})"


def _changes(
    before: Any, after: Any, path: _Path = (), *, is_field: bool = True
) -> Iterator[tuple[_Path, Any]]:
    """Yield where two jobs differ, and the value there of the second one.

    Raises:
        UsageError: it is no plain value, or one inside a list or a dict.
    """
    if is_dataclass(after) and (before is _ABSENT or _kind(before) == _kind(after)):
        for field in fields(after):
            values = getattr(before, field.name, _ABSENT), getattr(after, field.name)
            yield from _changes(*values, (*path, field.name), is_field=is_field)
    elif isinstance(after, (list, dict)) and type(before) is type(after) and not _is_plain(after):
        parts = [(dict(enumerate(one)) if isinstance(one, list) else one) for one in (before, after)]
        for key, value in parts[1].items():
            yield from _changes(parts[0].get(key, _ABSENT), value, (*path, str(key)), is_field=False)
    # No command line makes a function.
    elif not callable(after) and before != after and (before, after) != (_ABSENT, None):
        if not (is_field and _is_plain(after)):
            raise _unwritten(path)
        yield path, after


def _kind(config: Any) -> str:
    return type(config).__qualname__.removeprefix(_MERGED)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return value is None or type(value) in (bool, int, float, str)


def _unwritten(path: _Path) -> UsageError:
    return UsageError(
        f"what the command line makes of {'.'.join(path)} cannot be written down; use --emit cli."
    )
