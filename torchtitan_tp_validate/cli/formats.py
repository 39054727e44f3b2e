"""What a command found, written: an output format is a function here, and so one of every command.

A format knows no command: it is made of what `Findings` says, whatever was found. It writes one thing after
the other, as each is found: nothing is kept, so that memory does not grow with the result.

Foreign text (paths, names, messages that quote them) is made harmless in each format by rules of its own;
JSON needs none, since the encoder escapes its strings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from torchtitan_tp_validate.cli import files, output
from torchtitan_tp_validate.cli.files import visible

_T = TypeVar("_T")

Line = tuple[str, str]
"""A line for people and its style, in the words of rich; no style is plain. Foreign text is as it was."""

BAD, QUIET, GOOD = "bold red", "dim", "green"


@dataclass(frozen=True)
class Location:
    """Where the degree, or the dimension, is written.

    Attributes:
        file: its path.
        line: counted from 1, where it is known.
    """

    file: str
    line: int | None = None


@dataclass(frozen=True)
class Annotation:
    """What a CI system shows beside the code.

    Attributes:
        level: ``error`` or ``notice``.
        name: of what it is about.
        message: of one or more lines.
        location: the file that says so, where there is one.
    """

    level: str
    name: str
    message: str
    location: Location | None = None


class Findings(Generic[_T]):
    """How a command speaks of the things that it finds: all that a format is made of.

    Attributes:
        columns: the headings of a table.
        formats: those that the command alone has, by name.
        array: the member of the JSON document that the things are the items of, one by one; where they are
            none, the command has all of them and `document` holds them.
        written: how many have been written.
    """

    columns: Sequence[str] = ()
    formats: Mapping[str, Format] = MappingProxyType({})
    array: str = ""
    written: int = 0

    def opening(self) -> Iterable[Line]:
        """Return what people read before the first thing."""
        return ()

    def full(self, thing: _T) -> Iterable[Line]:
        """Return all that people read of one thing."""
        return ()

    def closing(self) -> Iterable[Line]:
        """Return what people read behind the last thing."""
        return ()

    def line(self, thing: _T) -> str:
        """Return one thing in one line."""
        raise NotImplementedError

    def annotation(self, thing: _T) -> Annotation | None:
        """Return what a CI system is to know of one thing, if anything."""
        return None

    def cells(self, thing: _T) -> Iterable[Line]:
        """Return one thing as a row of a table; where it is bad, the style says so."""
        raise NotImplementedError

    def document(self) -> Mapping[str, Any]:
        """Return the members of the JSON document, as far as they stand before `array`."""
        raise NotImplementedError

    def item(self, thing: _T) -> Any:
        """Return one thing as an item of `array`."""
        raise NotImplementedError

    def ending(self) -> Mapping[str, Any]:
        """Return the members of the JSON document that stand behind `array`."""
        return {}

    def note(self, thing: _T) -> None:
        """Note that one thing has been written."""
        self.written += 1


Written = Iterable["Line | str"]
"""Lines for people, each with a style; or text as it is, of a format that escapes by its own rules."""


class Format(NamedTuple):
    """An output format.

    Attributes:
        each: writes one thing.
        meaning: what help says of it.
        before: writes what stands before the first thing.
        after: writes what stands behind the last.
    """

    each: Callable[[Findings[Any], Any], Written]
    meaning: str
    before: Callable[[Findings[Any]], Written]
    after: Callable[[Findings[Any]], Written]


FORMATS: dict[str, Format] = {}
"""The name of a format -> the format; the first is the default. `output_format` adds to it."""

_Each = TypeVar("_Each", bound=Callable[[Findings[Any], Any], Written])


def _nothing(findings: Findings[Any]) -> Written:
    return ()


def output_format(
    meaning: str = "",
    *,
    before: Callable[[Findings[Any]], Written] = _nothing,
    after: Callable[[Findings[Any]], Written] = _nothing,
) -> Callable[[_Each], _Each]:
    """Make the function, which writes one thing, an output format of its name; for the rest see `Format`."""

    def add(function: _Each) -> _Each:
        FORMATS[function.__name__] = Format(function, meaning, before, after)
        return function

    return add


@contextlib.contextmanager
def writing(options: Any, findings: Findings[_T]) -> Iterator[Callable[[_T], None]]:
    """Give what writes one thing, in the format and to the place that the options name.

    Raises:
        UnreadableError: the output file cannot be written.
        OutputError: nor can standard output.
    """
    chosen = {**FORMATS, **findings.formats}[options.output_format]
    with place(options.output_file) as put:

        def write(thing: _T) -> None:
            put(chosen.each(findings, thing))
            findings.note(thing)

        put(chosen.before(findings))
        yield write
        put(chosen.after(findings))


@contextlib.contextmanager
def place(file: str | None) -> Iterator[Callable[[Written], None]]:
    """Give what writes to a file, or else to standard output: in color where that is a terminal.

    Raises:
        UnreadableError: the file cannot be written.
        OutputError: nor can standard output.
    """
    with output.standard_output() if file is None else files.replacing(file) as stream:
        in_color, paint = file is None and output.uses_color(stream), None
        encoding = stream.encoding or "utf-8"
        # A name may hold what a terminal does not show.
        errors = "backslashreplace" if file is None else "strict"

        def put(lines: Written) -> None:
            nonlocal paint
            for line in lines:
                if in_color and not isinstance(line, str):
                    paint = paint or output.painter()
                    paint(terminal(line[0]), line[1])
                else:
                    text = line if isinstance(line, str) else f"{terminal(line[0])}\n"
                    stream.write(text.encode(encoding, errors).decode(encoding))

        yield put


@output_format(
    "default", before=lambda findings: findings.opening(), after=lambda findings: findings.closing()
)
def full(findings: Findings[_T], thing: _T) -> Iterable[Line]:
    """Write what the command itself has to say."""
    return findings.full(thing)


@output_format("a line each")
def concise(findings: Findings[_T], thing: _T) -> Iterator[Line]:
    """Write a line."""
    yield findings.line(thing), ""


def _members(members: Mapping[str, Any]) -> Iterator[str]:
    return (f"\n  {_json(name, 2)}: {_json(value, 2)}" for name, value in members.items())


def _json(value: Any, indentation: int) -> str:
    from json import dumps

    return dumps(value, indent=2).replace("\n", "\n" + " " * indentation)


def _head(findings: Findings[Any]) -> Iterator[str]:
    array = [f"\n  {_json(findings.array, 2)}: ["] if findings.array else []
    yield "{" + ",".join([*_members(findings.document()), *array])


def _tail(findings: Findings[Any]) -> Iterator[str]:
    if findings.array:
        yield ",".join(["\n  ]", *_members(findings.ending())])
    yield "\n}\n"


@output_format("versioned schema", before=_head, after=_tail)
def json(findings: Findings[_T], thing: _T) -> Iterator[str]:
    """Write an item of the document's array, which may be longer than memory."""
    if findings.array:
        yield f"{',' if findings.written else ''}\n    {_json(findings.item(thing), 4)}"


@output_format("annotations")
def github(findings: Findings[_T], thing: _T) -> Iterator[str]:
    """Write a workflow command, or nothing.

    Source: docs.github.com, "Workflow commands for GitHub Actions"; ``toCommandValue`` of actions/toolkit.
    """
    annotation = findings.annotation(thing)
    if annotation is None:
        return
    where = {"title": f"tp-validate: {annotation.name}"}
    if annotation.location is not None:
        where["file"] = annotation.location.file
        if annotation.location.line is not None:
            where["line"] = str(annotation.location.line)
    properties = {key: _percent(visible(value), "%\r\n:,") for key, value in where.items()}
    fields = ",".join(f"{key}={value}" for key, value in properties.items())
    yield f"::{annotation.level} {fields}::{github_message(annotation.message)}\n"


def github_message(text: str) -> str:
    """Return the text as the message of a workflow command; its line breaks are kept."""
    return _percent("\n".join(map(visible, text.split("\n"))))


def _percent(text: str, characters: str = "%\r\n") -> str:
    for character in characters:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _headings(findings: Findings[Any]) -> Iterator[str]:
    yield _row(findings.columns)
    yield _row("---" for _ in findings.columns)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


@output_format(before=_headings)
def markdown(findings: Findings[_T], thing: _T) -> Iterator[str]:
    """Write a row of a table; what is bad stands in bold."""
    cells = ((literal(text), style) for text, style in findings.cells(thing))
    yield _row(f"**{text}**" if style == BAD else text for text, style in cells)


# What Markdown of GitHub takes literally, wherever it stands: no markup, no HTML, no mention, no reference.
_PLAIN = re.compile(r"(?:[^\W_]|(?<=[^\W_])_+(?=[^\W_])|[ .,;:()'\"/=+%?-])*")
_LINK = re.compile(r"://|www\.|\bGH-\d|:\w+:", re.IGNORECASE)


def literal(text: str) -> str:
    """Return the text as a cell of a Markdown table: in a code span where anything in it could be markup."""
    shown = visible(text)
    if _PLAIN.fullmatch(shown) and not _LINK.search(shown):
        return shown
    # A table is cut into cells first: there a backslash keeps a bar in its cell, in code too.
    shown = re.sub(r"\\*\|", lambda bar: "\\|" if bar[0] == "|" else f"{bar[0][:-1]}\\x7c", shown)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Yield the rows of a table for people, a line each.

    Args:
        rows: of equally many cells.
        right: the columns that are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(cells)
        ).rstrip()


# Of GitHub's runner: "::name ...::" at the start of a line, "##[name ...]" anywhere in it; "##vso[" of Azure.
# Source: ActionCommand.cs of actions/runner, "Logging commands" of Azure Pipelines.
_COMMAND = re.compile(r"^(\s*):(?=:)|#(?=#(?:vso)?\[)", re.IGNORECASE)


def terminal(text: str) -> str:
    r"""Return the text as one line for people: nothing in it moves the cursor or speaks to a CI runner.

    A workflow runner reads commands from whatever a step prints, so that ``::error::`` at the start of a
    line and ``##[error]`` are broken up too.
    """
    return _COMMAND.sub(lambda found: f"{found[1] or ''}\\x{ord(found[0][-1]):02x}", visible(text))


def block(text: str) -> str:
    """Return a text of several lines with each made harmless as by `terminal`."""
    return "\n".join(map(terminal, text.split("\n")))
