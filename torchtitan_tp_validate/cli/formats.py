"""The output formats: a function each, which alone makes it one of every command that has results.

A format knows no command: it is made of what `Findings` holds, whatever was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torchtitan_tp_validate.cli import escape, output
from torchtitan_tp_validate.cli.output import Line
from torchtitan_tp_validate.cli.verdicts import Location

_T = TypeVar("_T")


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


@dataclass(frozen=True)
class Findings(Generic[_T]):
    """What a command found, and how it speaks of it: all that a format is made of.

    Attributes:
        things: what was found, made one by one and gone through once.
        full: all of them for people, in the command's own words.
        line: one of them, in one line.
        annotation: of one of them, or None where a CI system need not know of it.
        columns: the headings of a table.
        cells: one of them as a row of it; where it is bad, the style says so.
        document: all of them as the members of a JSON object; an iterator becomes an array, item by item.
    """

    things: Iterable[_T]
    full: Callable[[Iterable[_T]], Iterable[Line]]
    line: Callable[[_T], str]
    annotation: Callable[[_T], Annotation | None]
    columns: Sequence[str]
    cells: Callable[[_T], Iterable[Line]]
    document: Callable[[Iterable[_T]], Iterable[tuple[str, Any]]]


class Format(NamedTuple):
    """An output format.

    Attributes:
        lines: makes the result: with a style for people, as text where it escapes by its own rules.
        meaning: what help says of it.
    """

    lines: Callable[[Findings[Any]], Iterable[Line | str]]
    meaning: str


FORMATS: dict[str, Format] = {}
"""The name of a format -> the format; the first is the default. `output_format` adds to it."""

_Lines = TypeVar("_Lines", bound=Callable[[Findings[Any]], Iterable[Line | str]])


def output_format(meaning: str = "") -> Callable[[_Lines], _Lines]:
    """Make the function an output format of its name."""

    def add(function: _Lines) -> _Lines:
        FORMATS[function.__name__] = Format(function, meaning)
        return function

    return add


def emit(options: Any, findings: Findings[Any]) -> None:
    """Write what was found in the format and to the place that the options name.

    Raises:
        UnreadableError: the output file cannot be written.
        OutputError: nor can standard output.
    """
    output.put(options, FORMATS[options.output_format].lines(findings))


@output_format("default")
def full(findings: Findings[_T]) -> Iterable[Line]:
    """Return what the command itself has to say."""
    return findings.full(findings.things)


@output_format("a line each")
def concise(findings: Findings[_T]) -> Iterator[Line]:
    """Return a line for each."""
    return ((findings.line(thing), "") for thing in findings.things)


@output_format("versioned schema")
def json(findings: Findings[_T]) -> Iterator[str]:
    """Return one document, whose arrays may be longer than memory."""
    from json import dumps

    def indented(value: Any, by: int) -> str:
        return dumps(value, indent=2).replace("\n", "\n" + " " * by)

    ending = "{"
    for name, value in findings.document(findings.things):
        yield ending
        if isinstance(value, Iterator):
            ending = f"  {dumps(name)}: ["
            for number, item in enumerate(value):
                yield f"{ending}," if number else ending
                ending = f"    {indented(item, 4)}"
            yield ending
            ending = "  ],"
        else:
            ending = f"  {dumps(name)}: {indented(value, 2)},"
    yield ending.removesuffix(",")
    yield "}"


@output_format("annotations")
def github(findings: Findings[_T]) -> Iterator[str]:
    """Return workflow commands; source: docs.github.com, "Workflow commands for GitHub Actions"."""
    for annotation in map(findings.annotation, findings.things):
        if annotation is None:
            continue
        where = {"title": f"tp-validate: {annotation.name}"}
        if annotation.location is not None:
            where["file"] = annotation.location.file
            if annotation.location.line is not None:
                where["line"] = str(annotation.location.line)
        fields = ",".join(f"{key}={escape.github_property(value)}" for key, value in where.items())
        yield f"::{annotation.level} {fields}::{escape.github(annotation.message)}"


@output_format()
def markdown(findings: Findings[_T]) -> Iterator[str]:
    """Return a table with a row for each; what is bad stands in bold."""

    def row(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    yield row(findings.columns)
    yield row("---" for _ in findings.columns)
    for thing in findings.things:
        cells = ((escape.markdown(text), style) for text, style in findings.cells(thing))
        yield row(f"**{text}**" if style == output.BAD else text for text, style in cells)
