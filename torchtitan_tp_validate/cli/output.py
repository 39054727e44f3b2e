"""Reports as text: the five output formats, and where they go."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from torchtitan_tp_validate.cli import files
from torchtitan_tp_validate.cli.report import Judgement, Report, Status, as_json, count
from torchtitan_tp_validate.rules import ranges

_T = TypeVar("_T")

Line = tuple[str, str]
"""A line and its style, in the words of rich; no style is plain."""

_WIDEST = 500
_BAD, _QUIET, _GOOD = "bold red", "dim", "green"


def emit(options: Any, reports: Sequence[Report], full: Callable[[], Iterable[Line]]) -> None:
    """Write the reports in the format and to the place that the options name.

    Args:
        full: the lines of the full format, which is the command's own.

    Raises:
        UnreadableError: the output file cannot be written.
    """
    if options.output_format == "full":
        lines = list(full())
    else:
        lines = [(line, "") for line in _FORMATS[options.output_format](options.command, reports)]
    put(options, lines)


def put(options: Any, lines: Sequence[Line]) -> None:
    """Write lines to the output file, or to standard output: in colour where that is a terminal."""
    if options.output_file is not None:
        files.write(options.output_file, "".join(f"{line}\n" for line, _ in lines))
    elif lines and uses_colour(sys.stdout):
        from rich.console import Console
        from rich.text import Text

        # Lines are as long as they are: a terminal wraps them itself.
        console = Console(force_terminal=True, highlight=False, soft_wrap=True)
        for line, style in lines:
            console.print(Text(line, style=style))
    else:
        _print("".join(f"{line}\n" for line, _ in lines))


def uses_colour(stream: TextIO) -> bool:
    """Whether to colour what goes there: https://no-color.org, else a terminal that is not dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def show(renderable: Any) -> None:
    """Draw a table of rich on standard output, in colour."""
    from rich.console import Console

    console = Console(force_terminal=True, highlight=False)
    # A narrow terminal wraps its lines; columns that vanish would be worse.
    console.width = max(console.width, width_of(renderable, console))
    console.print(renderable)


def width_of(renderable: Any, console: Any) -> int:
    """How many columns a table of rich needs to show everything."""
    width: int = console.measure(renderable, options=console.options.update(width=_WIDEST)).maximum
    return width


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[Sequence[_T]], Iterable[_T]]]:
    """A progress bar on standard error while its items are gone through, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda items: items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield lambda items: bar.track(items, description=title)


def verdicts(reports: Sequence[Report]) -> Iterator[Line]:
    """The full format of check and audit: every problem in full, what fits in few words."""
    tally = count(reports)
    many = len(reports) > 1
    for report in reports:
        if report.status is Status.INCOMPATIBLE:
            yield from _problems(report)
            if many and len(report.judgements) == 1:
                yield "", ""
        elif report.status is Status.NOT_VALIDATED:
            yield f"{report.name}: {report.note}", _BAD
        elif report.status is Status.COMPATIBLE and not many:
            yield concise(report), ""
    skipped = [report for report in reports if report.status is Status.SKIPPED]
    if skipped:
        yield "Skipped, not judged:", ""
        yield from ((f"  {report.name}: {report.note}", _QUIET) for report in skipped)
    if many:
        fine = tally["incompatible"] == tally["not_validated"] == 0
        yield _summary(tally), _GOOD if fine else _BAD


def concise(report: Report) -> str:
    """One line."""
    if report.note:
        said = report.note.startswith("Not validated: ")
        return f"{report.name}: {'' if said else _words(report.status) + ': '}{report.note}"
    by = f" by {_possessive(report.framework)} rule" if report.plan else ""
    if len(report.judgements) == 1:
        (judgement,) = report.judgements
        if judgement.error is None:
            model = f" {report.plan.model}" if report.plan else ", which splits nothing"
            return f"{report.name}: {_asked(judgement)} fits{model}{by}.{_works(report)}{not_judged(report)}"
        problems = "; ".join(
            f"{v.code} {v.dim} = {v.size} {v.problem} in {v.where}" for v in judgement.error.violations
        )
        verdict = f"{report.name}: {_asked(judgement)} does not fit{by}: {problems}."
        return verdict + _works(report) + not_judged(report)
    fits = [judgement.degrees.tp for judgement in report.judgements if judgement.error is None]
    asked = [judgement.degrees.tp for judgement in report.judgements]
    binding = f" The binding constraint is {report.binding}." if report.binding else ""
    verdict = f"{report.name}: {ranges(fits) or 'none'} of the TP degrees {ranges(asked)} fit{by}."
    return verdict + binding + not_judged(report)


def not_judged(report: Report) -> str:
    """Which rules the verdict leaves out and why, as a sentence behind it, or nothing."""
    left_out = report.not_judged
    return f" Not validated: {'; '.join(left_out)}." if left_out else ""


def _problems(report: Report) -> Iterator[Line]:
    by = f"{report.name} (by {_possessive(report.framework)} rule):"
    if len(report.judgements) > 1:
        yield concise(report), _BAD
        return
    error = report.judgements[0].error
    assert error is not None
    yield by, ""
    for number, line in enumerate(str(error).splitlines()):
        yield line, _BAD if number == 0 else ""
    if left_out := not_judged(report).strip():
        yield left_out, ""


def _words(status: Status) -> str:
    return status.value.replace("_", " ")


def _possessive(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _asked(judgement: Judgement) -> str:
    degrees = judgement.degrees
    return f"TP {degrees.tp}" + (f" with EP {degrees.ep}" if degrees.ep > 1 else "")


def _works(report: Report) -> str:
    if report.plan is None or not report.plan.dims:
        return ""
    return f" Degrees that work: {', '.join(map(str, report.plan.valid_degrees()))}."


def _summary(tally: dict[str, int]) -> str:
    words = {
        "incompatible": "do not fit",
        "not_validated": "could not be judged",
        "compatible": "fit",
        "skipped": "skipped",
    }
    return ", ".join(f"{tally[status]} {word}" for status, word in words.items() if tally[status]) + "."


def _concise(command: str, reports: Sequence[Report]) -> Iterator[str]:
    del command
    yield from map(concise, reports)


def _json(command: str, reports: Sequence[Report]) -> Iterator[str]:
    import json

    yield json.dumps(as_json(command, reports), indent=2)


def _github(command: str, reports: Sequence[Report]) -> Iterator[str]:
    """Workflow commands; source: docs.github.com, "Workflow commands for GitHub Actions"."""
    del command
    levels = {Status.INCOMPATIBLE: "error", Status.NOT_VALIDATED: "error", Status.SKIPPED: "notice"}
    for report in reports:
        level = levels.get(report.status)
        if level is None:
            continue
        where = {"title": f"tp-validate: {report.name}"}
        if report.location is not None:
            where["file"] = report.location.file
            if report.location.line is not None:
                where["line"] = str(report.location.line)
        fields = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in where.items())
        yield f"::{level} {fields}::{_escaped(_message(report))}"


def _message(report: Report) -> str:
    errors = [str(judgement.error) for judgement in report.judgements if judgement.error]
    if report.note:
        return report.note
    return errors[0] if len(report.judgements) == 1 else concise(report)


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _markdown(command: str, reports: Sequence[Report]) -> Iterator[str]:
    """A table: of verdicts, or of models by degrees where several degrees were looked at."""
    del command
    by_degree = any(len(report.judgements) > 1 for report in reports)
    asked = sorted({j.degrees.tp for report in reports for j in report.judgements}) if by_degree else []
    heads = [f"TP {tp}" for tp in asked] if by_degree else ["asked for", "verdict"]
    yield _row(["name", *heads, "binding constraint", "degrees that work"])
    yield _row(["---"] * (3 + len(heads)))
    for report in reports:
        if report.note:
            cells = [_words(report.status)] + [""] * (len(heads) - 1)
            yield _row([report.name, *cells, report.note, ""])
            continue
        if by_degree:
            fits = {j.degrees.tp: "yes" if j.error is None else "no" for j in report.judgements}
            cells = [fits.get(tp, "") for tp in asked]
        else:
            (judgement,) = report.judgements
            cells = [_asked(judgement), "fits" if judgement.error is None else "**does not fit**"]
        works = ", ".join(map(str, report.plan.valid_degrees())) if report.plan else ""
        yield _row([report.name, *cells, report.binding, works])


def _row(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


_FORMATS: dict[str, Callable[[str, Sequence[Report]], Iterator[str]]] = {
    "concise": _concise,
    "json": _json,
    "github": _github,
    "markdown": _markdown,
}


def _print(text: str) -> None:
    """Print what the terminal can show: a name may hold what its encoding does not."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
