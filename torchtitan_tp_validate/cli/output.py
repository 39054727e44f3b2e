"""Reports as text: the five output formats, and where they go.

Everything is written as it is found: no report is kept, so that memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from torchtitan_tp_validate.cli import escape, files
from torchtitan_tp_validate.cli.verdicts import Judgement, Report, Status, Tally, as_json
from torchtitan_tp_validate.errors import TPValidateError
from torchtitan_tp_validate.rules import Axis, Plan, ranges

_T = TypeVar("_T")

Line = tuple[str, str]
"""A line and its style, in the words of rich; no style is plain. Foreign text may stand in it as it is."""

_WIDEST = 500
_BAD, _QUIET, _GOOD = "bold red", "dim", "green"


class OutputError(TPValidateError):
    """Standard output does not take the result; the text says why."""


def emit(
    options: Any, reports: Iterable[Report], full: Callable[[Iterable[Report]], Iterable[Line]]
) -> Tally:
    """Write the reports in the format and to the place that the options name, one by one.

    Args:
        full: makes the lines of the full format, which is the command's own.

    Returns:
        the tally of what was written.

    Raises:
        UnreadableError: the output file cannot be written.
        OutputError: nor can standard output.
    """
    tally = Tally()
    watched = tally.watch(reports)
    if options.output_format == "full":
        put(options, full(watched))
    elif options.output_format == "concise":
        put(options, ((concise(report), "") for report in watched))
    else:
        put_document(options, _DOCUMENTS[options.output_format](options, watched))
    return tally


def put(options: Any, lines: Iterable[Line]) -> None:
    """Write lines for people to the output file, or to standard output: in color where that is a terminal.

    Each stays one line, whatever names it quotes.
    """
    safe = ((escape.terminal(line), style) for line, style in lines)
    if options.output_file is None and sys.stdout is not None and uses_colour(sys.stdout):
        with _standard_output():
            _print_styled(safe)
    else:
        put_document(options, (line for line, _ in safe))


def put_document(options: Any, lines: Iterable[str]) -> None:
    """Write the lines of a format that escapes foreign text by its own rules."""
    ended = (f"{line}\n" for line in lines)
    if options.output_file is not None:
        files.write(options.output_file, ended)
        return
    with _standard_output() as stream:
        for line in ended:
            # A name may hold what the encoding does not.
            encoding = stream.encoding or "utf-8"
            stream.write(line.encode(encoding, "backslashreplace").decode(encoding))


def _print_styled(lines: Iterable[Line]) -> None:
    from rich.console import Console
    from rich.text import Text

    # Lines are as long as they are: a terminal wraps them itself.
    console = Console(force_terminal=True, highlight=False, soft_wrap=True)
    for line, style in lines:
        console.print(Text(line, style=style))


@contextlib.contextmanager
def _standard_output() -> Iterator[TextIO]:
    """Standard output, written to the end.

    Raises:
        OutputError: it does not take it.
        BrokenPipeError: nobody reads it any more.
    """
    if sys.stdout is None:
        raise OutputError("the result cannot be written: standard output is closed.")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"the result cannot be written to standard output: {files.reason(error)}"
        ) from error


def uses_colour(stream: TextIO) -> bool:
    """Whether to colour what goes there: https://no-color.org, else a terminal that is not dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def show(renderable: Any) -> None:
    """Draw a table of rich on standard output, in colour."""
    from rich.console import Console

    with _standard_output():
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


def verdicts(reports: Iterable[Report]) -> Iterator[Line]:
    """The full format of check and audit: every problem in full, what fits in few words."""
    tally = Tally()
    watched = tally.watch(reports)
    first = list(itertools.islice(watched, 2))
    many = len(first) > 1
    skipped: list[str] = []
    for report in itertools.chain(first, watched):
        if report.status is Status.INCOMPATIBLE:
            yield from _problems(report)
            if many and len(report.judgements) == 1:
                yield "", ""
        elif report.status is Status.NOT_VALIDATED:
            # The layout of a long reason is ours; a name has none.
            said = f"{escape.visible(report.name)}: {report.note}"
            yield from ((line, _BAD) for line in said.split("\n"))
        elif report.status is Status.SKIPPED:
            skipped.append(f"  {report.name}: {_in_one_line(report.note)}")
        elif report.status is Status.LISTED or not many:
            yield concise(report), ""
    if skipped:
        yield "Skipped, not judged:", ""
        yield from ((line, _QUIET) for line in skipped)
    if many:
        counts = tally.counts()
        fine = counts["incompatible"] == counts["not_validated"] == 0
        yield _summary(counts), _GOOD if fine else _BAD


def concise(report: Report) -> str:
    """One line."""
    if report.note:
        said = report.note.startswith("Not validated: ")
        note = _in_one_line(report.note)
        return f"{report.name}: {'' if said else _words(report.status) + ': '}{note}"
    by = f" by {possessive(report.framework)} rule" if report.plan else ""
    if report.status is Status.LISTED and not report.judgements:
        assert report.plan is not None
        verdict = f"{report.name}:{_works(report, f' for {report.plan.model}{by}')}"
        return verdict + _binding(report) + not_judged(report)
    if len(report.judgements) == 1:
        (judgement,) = report.judgements
        if judgement.error is None:
            model = f" {report.plan.model}" if report.plan else ", which splits nothing"
            verdict = f"{report.name}: {_requested(report, judgement)} fits{model}{by}."
            return verdict + _works(report) + not_judged(report)
        problems = "; ".join(
            f"{v.code} {v.dim} = {v.size} {v.problem} in {v.where}" for v in judgement.error.violations
        )
        verdict = f"{report.name}: {_requested(report, judgement)} does not fit{by}: {problems}."
        return verdict + _works(report) + not_judged(report)
    fits = [judgement.degrees.tp for judgement in report.judgements if judgement.error is None]
    asked = [judgement.degrees.tp for judgement in report.judgements]
    verdict = f"{report.name}: {ranges(fits) or 'none'} of the TP degrees {ranges(asked)} fit{by}."
    return verdict + _binding(report) + not_judged(report)


def _binding(report: Report) -> str:
    return f" The binding constraint is {report.binding}." if report.binding else ""


def _in_one_line(note: str) -> str:
    return " ".join(note.split("\n"))


def not_judged(report: Report) -> str:
    """Which rules the verdict leaves out and why, as a sentence behind it, or nothing."""
    left_out = report.not_judged
    told = any(rule.startswith("EP001") for rule in left_out)
    ep = max((judgement.degrees.ep for judgement in report.judgements), default=1)
    experts = f" EP {ep} was not judged: no experts were found." if ep > 1 and not told else ""
    if report.plan is None or _has_experts(report.plan):
        experts = ""
    return experts + (f" Not validated: {'; '.join(left_out)}." if left_out else "")


def _has_experts(plan: Plan) -> bool:
    return any(dim.rule.axis is Axis.EP for dim in plan.dims)


def _problems(report: Report) -> Iterator[Line]:
    by = f"{report.name} (by {possessive(report.framework)} rule):"
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


def possessive(name: str) -> str:
    """Return the name with what makes it an owner."""
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _requested(report: Report, judgement: Judgement) -> str:
    """The degrees that the verdict is about: EP only where experts were judged by it."""
    degrees = judgement.degrees
    judged = report.plan is None or _has_experts(report.plan)
    return f"TP {degrees.tp}" + (f" with EP {degrees.ep}" if degrees.ep > 1 and judged else "")


def _works(report: Report, of: str = "") -> str:
    if report.plan is None or not report.plan.dims:
        return " Nothing of it is split: every degree works." if of else ""
    return f" Degrees that work{of}: {', '.join(map(str, report.plan.valid_degrees()))}."


def _summary(tally: dict[str, int]) -> str:
    words = {
        "incompatible": "do not fit",
        "not_validated": "could not be judged",
        "compatible": "fit",
        "listed": "listed",
        "skipped": "skipped",
    }
    return ", ".join(f"{tally[status]} {word}" for status, word in words.items() if tally[status]) + "."


def _json(options: Any, reports: Iterable[Report]) -> Iterator[str]:
    """The document of `as_json`, one result at a time; the summary comes last."""
    import json

    def member(name: str, value: Any) -> str:
        return f"  {json.dumps(name)}: " + json.dumps(value, indent=2).replace("\n", "\n  ")

    tally = Tally()
    head = as_json(options.command, [])
    del head["summary"], head["results"]
    yield "{"
    for name, value in head.items():
        yield f"{member(name, value)},"
    yield '  "results": ['
    previous = None
    for report in tally.watch(reports):
        if previous is not None:
            yield f"{previous},"
        (result,) = as_json(options.command, [report])["results"]
        previous = "    " + json.dumps(result, indent=2).replace("\n", "\n    ")
    if previous is not None:
        yield previous
    yield "  ],"
    yield member("summary", tally.counts())
    yield "}"


def _github(options: Any, reports: Iterable[Report]) -> Iterator[str]:
    """Workflow commands; source: docs.github.com, "Workflow commands for GitHub Actions"."""
    del options
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
        fields = ",".join(f"{key}={escape.github_property(value)}" for key, value in where.items())
        yield f"::{level} {fields}::{escape.github(_message(report))}"


def _message(report: Report) -> str:
    errors = [str(judgement.error) for judgement in report.judgements if judgement.error]
    if report.note:
        return report.note
    return errors[0] if len(report.judgements) == 1 else concise(report)


def _markdown(options: Any, reports: Iterable[Report]) -> Iterator[str]:
    """A table: of verdicts, or of models by degrees where several degrees were looked at."""
    requested = getattr(options, "tp", None) or ()
    by_degree = len(requested) > 1
    heads = [f"TP {tp}" for tp in requested] if by_degree else ["asked for", "verdict"]
    yield _row(["name", *heads, "binding constraint", "degrees that work"])
    yield _row(["---"] * (3 + len(heads)))
    for report in reports:
        name = escape.markdown(report.name)
        if report.note:
            cells = [_words(report.status)] + [""] * (len(heads) - 1)
            yield _row([name, *cells, escape.markdown(_in_one_line(report.note)), ""])
            continue
        if by_degree:
            fits = {j.degrees.tp: "yes" if j.error is None else "no" for j in report.judgements}
            cells = [fits.get(tp, "") for tp in requested]
        elif not report.judgements:
            cells = ["", _words(report.status)]
        else:
            (judgement,) = report.judgements
            verdict = "fits" if judgement.error is None else "**does not fit**"
            cells = [_requested(report, judgement), verdict]
        works = ", ".join(map(str, report.plan.valid_degrees())) if report.plan else ""
        yield _row([name, *cells, escape.markdown(report.binding), works])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


_DOCUMENTS: dict[str, Callable[[Any, Iterable[Report]], Iterator[str]]] = {
    "json": _json,
    "github": _github,
    "markdown": _markdown,
}
