"""What is said of reports: in full, in one line, as an annotation, as a row of a table, as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torchtitan_tp_validate.cli import escape, formats
from torchtitan_tp_validate.cli.formats import Annotation, Findings
from torchtitan_tp_validate.cli.output import BAD, GOOD, QUIET, Line
from torchtitan_tp_validate.cli.verdicts import Judgement, Report, Status, Tally, as_json
from torchtitan_tp_validate.degrees import Axis
from torchtitan_tp_validate.plan import Plan, ranges

_LEVELS = {Status.INCOMPATIBLE: "error", Status.NOT_VALIDATED: "error", Status.SKIPPED: "notice"}


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
    requested = getattr(options, "tp", None) or ()
    by_degree = requested if len(requested) > 1 else ()
    heads = [f"TP {tp}" for tp in by_degree] or ["asked for", "verdict"]
    findings = Findings(
        tally.watch(reports),
        full=full,
        line=concise,
        annotation=_annotation,
        columns=["name", *heads, "binding constraint", "degrees that work"],
        cells=lambda report: _cells(report, by_degree),
        document=lambda found: _document(options.command, found),
    )
    formats.emit(options, findings)
    return tally


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
            yield from ((line, BAD) for line in said.split("\n"))
        elif report.status is Status.SKIPPED:
            skipped.append(f"  {report.name}: {_in_one_line(report.note)}")
        elif report.status is Status.LISTED or not many:
            yield concise(report), ""
    if skipped:
        yield "Skipped, not judged:", ""
        yield from ((line, QUIET) for line in skipped)
    if many:
        counts = tally.counts()
        fine = counts["incompatible"] == counts["not_validated"] == 0
        yield _summary(counts), GOOD if fine else BAD


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
    return any(dim.axis is Axis.EP for dim in plan.dims)


def _problems(report: Report) -> Iterator[Line]:
    by = f"{report.name} (by {possessive(report.framework)} rule):"
    if len(report.judgements) > 1:
        yield concise(report), BAD
        return
    error = report.judgements[0].error
    assert error is not None
    yield by, ""
    for number, line in enumerate(str(error).splitlines()):
        yield line, BAD if number == 0 else ""
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


def _annotation(report: Report) -> Annotation | None:
    level = _LEVELS.get(report.status)
    return Annotation(level, report.name, _message(report), report.location) if level else None


def _message(report: Report) -> str:
    errors = [str(judgement.error) for judgement in report.judgements if judgement.error]
    if report.note:
        return report.note
    return errors[0] if len(report.judgements) == 1 else concise(report)


def _cells(report: Report, requested: Sequence[int]) -> Iterator[Line]:
    """One row: of a verdict, or of the degrees where several were looked at."""
    yield report.name, ""
    if report.note:
        yield _words(report.status), ""
        yield from [("", "")] * ((len(requested) or 2) - 1)
        yield _in_one_line(report.note), ""
        yield "", ""
        return
    if requested:
        fits = {j.degrees.tp: "yes" if j.error is None else "no" for j in report.judgements}
        yield from ((fits.get(tp, ""), "") for tp in requested)
    elif not report.judgements:
        yield "", ""
        yield _words(report.status), ""
    else:
        (judgement,) = report.judgements
        yield _requested(report, judgement), ""
        yield ("fits", "") if judgement.error is None else ("does not fit", BAD)
    yield report.binding, ""
    yield ", ".join(map(str, report.plan.valid_degrees())) if report.plan else "", ""


def _document(command: str, reports: Iterable[Report]) -> Iterator[tuple[str, Any]]:
    """The members of `as_json`, one result at a time; the summary comes last."""
    tally = Tally()
    head = as_json(command, [])
    del head["summary"], head["results"]
    yield from head.items()
    yield "results", (as_json(command, [report])["results"][0] for report in tally.watch(reports))
    yield "summary", tally.counts()
