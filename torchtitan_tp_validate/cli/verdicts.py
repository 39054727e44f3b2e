"""Verdicts on models, configs and files: a `Report` each, and what check, table and audit say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli.files import visible
from torchtitan_tp_validate.cli.formats import BAD, GOOD, QUIET, Annotation, Findings, Line, Location
from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.errors import Problem, RunError
from torchtitan_tp_validate.plan import Plan, ranges
from torchtitan_tp_validate.validate import compat_error, raise_if_unread

if TYPE_CHECKING:
    from torchtitan_tp_validate.rehearsal.memory import State

SCHEMA_VERSION = 1
"""Version of the JSON output; a field that changes its meaning or goes away raises it."""


class Status(Enum):
    """The verdict on one thing."""

    COMPATIBLE = "compatible"
    INCOMPATIBLE = "incompatible"
    LISTED = "listed"
    """Shown with the degrees that work; none was asked for."""
    SKIPPED = "skipped"
    """Not judged: what it needs is not installed here, or it is no model's. Never counted as passed."""
    NOT_VALIDATED = "not_validated"
    """Could not be judged although it was asked for."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one choice of degrees.

    Attributes:
        degrees: the choice.
        error: what is wrong with it, or None.
        in_world: whether its TP degree divides the number of ranks, where that was given.
        warnings: what is told of it, and does not speak against it.
        state: what its fullest rank holds, where that was asked for.
    """

    degrees: Degrees
    error: RunError | None
    in_world: bool = True
    warnings: tuple[Problem, ...] = ()
    state: State | None = None

    @property
    def mark(self) -> str:
        """In a few letters: `-` where it does not work, else the GiB of its fullest rank, or `yes`."""
        if self.error is not None:
            return "-"
        return self.state.gib if self.state is not None else "yes"


@dataclass(frozen=True)
class Report:
    """What was found about one model, config or file.

    Attributes:
        name: what to call it.
        judgements: a verdict per TP degree that was asked for.
        plan: what is split; None when nothing is, or when it could not be read.
        group: what it belongs to, e.g. the model of a flavor.
        framework: whose rule it was judged by.
        location: the file that says so.
        note: why there is no verdict.
        skipped: whether that is no error: what it needs is not installed here, or it is no model's.
        listed: whether no degree was asked for, and all are only shown.
        assumed: what was taken for granted to get so far, e.g. the hardware.
        unread: what of it was not judged beside a verdict on the rest.
        repairs: the codes of the known faults that it fits only with the repairs of.
        search: the command that lists what works instead, or empty.
    """

    name: str
    judgements: tuple[Judgement, ...] = ()
    plan: Plan | None = None
    group: str = ""
    framework: str = "torchtitan"
    location: Location | None = None
    note: str = ""
    skipped: bool = False
    listed: bool = False
    assumed: str = ""
    unread: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    search: str = ""

    @property
    def not_judged(self) -> tuple[str, ...]:
        """What the verdict leaves out, and why."""
        rules = self.plan.not_judged if self.plan else ()
        return (*rules, *self.unread, self.assumed) if self.assumed else (*rules, *self.unread)

    @property
    def status(self) -> Status:
        """The worst that was found."""
        if self.note:
            return Status.SKIPPED if self.skipped else Status.NOT_VALIDATED
        if self.listed:
            return Status.LISTED
        broken = any(judgement.error for judgement in self.judgements)
        return Status.INCOMPATIBLE if broken else Status.COMPATIBLE

    @property
    def binding(self) -> str:
        """The dimension that keeps the TP degree from being doubled, in words; empty when none does."""
        if self.plan is None:
            return ""
        valid = self.plan.valid_degrees()
        broken = self.plan.violations(self.plan.degrees.vary(tp=2 * valid[-1] if valid else 1))
        return f"{broken[0].code} {broken[0].name} = {broken[0].size}" if broken else ""


def judge(plan: Plan, choices: Iterable[Degrees]) -> tuple[Judgement, ...]:
    """Return the verdict of the engine on each choice of degrees.

    Raises:
        PlanError: a choice seems to fit, but part of the model could not be read.
    """
    judgements = []
    for choice in choices:
        error = compat_error(plan, choice)
        if error is None:
            raise_if_unread(plan.at(choice))
        judgements.append(Judgement(choice, error))
    return tuple(judgements)


def unexpected(error: Exception) -> str:
    """Return what to say of an exception that nobody foresaw: its type, its text, where, and what to do.

    Each thing is judged by itself: one that this package stumbles over must not hide the verdict on the rest.
    """
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "torchtitan_tp_validate" in frame.filename] or frames
    at = f" (at {'/'.join(ours[-1].filename.split('/')[-2:])}:{ours[-1].lineno})" if ours else ""
    return (
        f"Not validated: an unexpected {type(error).__name__}: {' '.join(str(error).split())}{at}. This is a "
        "fault of tp-validate, not of yours: please report it with this line, the input and the output of "
        "tp-validate doctor."
    )


_LEVELS = {Status.INCOMPATIBLE: "error", Status.NOT_VALIDATED: "error", Status.SKIPPED: "notice"}
_GIB = ("GiB per rank",)
_SUMMARY = {
    Status.INCOMPATIBLE: "do not fit",
    Status.NOT_VALIDATED: "could not be judged",
    Status.COMPATIBLE: "fit",
    Status.LISTED: "listed",
    Status.SKIPPED: "skipped",
}


class Verdicts(Findings[Report]):
    """What is said of reports, which are counted as they go by: none is kept."""

    array = "results"

    def __init__(
        self, command: str, requested: Sequence[int] = (), *, many: bool = True, memory: bool = False
    ) -> None:
        """Begin to speak for a command.

        Args:
            command: its name.
            requested: the TP degrees that it looks at.
            many: whether there is more than one report.
            memory: whether what a rank holds was asked for.
        """
        self._command = command
        self._by_degree = requested if len(requested) > 1 else ()
        self._many = many
        self._found = dict.fromkeys(Status, 0)
        self._skipped: list[str] = []
        heads = [f"TP {tp}" for tp in self._by_degree] or ["asked for", "verdict", *_GIB[: int(memory)]]
        self._heads = len(heads)
        self.columns = ["name", *heads, "binding constraint", "degrees that work"]

    def note(self, thing: Report) -> None:
        """Count the report."""
        self.written += 1
        self._found[thing.status] += 1

    @property
    def judged_none(self) -> bool:
        """Whether everything was skipped."""
        return self.written == self._found[Status.SKIPPED]

    @property
    def exit_status(self) -> int:
        """0 when all that was judged fits, 1 when something does not, 2 when something was not judged."""
        if self._found[Status.NOT_VALIDATED]:
            return 2
        return 1 if self._found[Status.INCOMPATIBLE] else 0

    def full(self, thing: Report) -> Iterator[Line]:
        """Yield every problem in full, and what fits in few words."""
        if thing.status is Status.INCOMPATIBLE:
            yield from _problems(thing)
            if thing.search:
                yield f"The layouts that work, nearest first: {thing.search}", ""
            if self._many and len(thing.judgements) == 1:
                yield "", ""
        elif thing.status is Status.NOT_VALIDATED:
            # The layout of a long reason is ours; a name has none.
            said = f"{visible(thing.name)}: {thing.note}"
            yield from ((line, BAD) for line in said.split("\n"))
        elif thing.status is Status.SKIPPED:
            self._skipped.append(f"  {thing.name}: {_in_one_line(thing.note)}")
        elif thing.status is Status.LISTED or not self._many:
            yield self.line(thing), ""

    def closing(self) -> Iterator[Line]:
        """Yield what was skipped, and a summary where there were several."""
        if self._skipped:
            yield "Skipped, not judged:", ""
            yield from ((line, QUIET) for line in self._skipped)
        if self._many:
            counts = [
                f"{self._found[status]} {said}" for status, said in _SUMMARY.items() if self._found[status]
            ]
            fine = not (self._found[Status.INCOMPATIBLE] or self._found[Status.NOT_VALIDATED])
            yield ", ".join(counts) + ".", GOOD if fine else BAD

    def line(self, thing: Report) -> str:
        """Return the verdict in one line."""
        return concise(thing)

    def annotation(self, thing: Report) -> Annotation | None:
        """Return what is wrong with it, where it stands."""
        level = _LEVELS.get(thing.status)
        if level is None:
            return None
        errors = [str(judgement.error) for judgement in thing.judgements if judgement.error]
        message = thing.note or (errors[0] if len(thing.judgements) == 1 else concise(thing))
        return Annotation(level, thing.name, message, thing.location)

    def cells(self, thing: Report) -> Iterator[Line]:
        """Yield one row: of a verdict, or of the degrees where several were looked at."""
        yield thing.name, ""
        if thing.note:
            yield _words(thing.status), ""
            yield from [("", "")] * (self._heads - 1)
            yield _in_one_line(thing.note), ""
            yield "", ""
            return
        if self._by_degree:
            fits = {j.degrees.tp: "no" if j.error else j.mark for j in thing.judgements}
            yield from ((fits.get(tp, ""), "") for tp in self._by_degree)
        elif not thing.judgements:
            yield "", ""
            yield _words(thing.status), ""
            yield from [("", "")] * (self._heads - 2)
        else:
            (judgement,) = thing.judgements
            yield _requested(thing, judgement), ""
            yield ("fits", "") if judgement.error is None else ("does not fit", BAD)
            held = judgement.state.gib if judgement.state else ""
            yield from [(held, "")] * (self._heads - 2)
        yield thing.binding, ""
        yield ", ".join(map(str, thing.plan.valid_degrees())) if thing.plan else "", ""

    def document(self) -> dict[str, Any]:
        """Return what stands before the results; ``schema.json`` beside this file describes the whole."""
        from torchtitan_tp_validate import __version__

        return {
            "schema_version": SCHEMA_VERSION,
            "tool": {"name": "tp-validate", "version": __version__},
            "command": self._command,
        }

    def item(self, thing: Report) -> dict[str, Any]:
        """Return the report as a result of the document."""
        plan = thing.plan
        return {
            "name": thing.name,
            "group": thing.group or None,
            "status": thing.status.value,
            "framework": thing.framework,
            "reason": thing.note or None,
            "location": asdict(thing.location) if thing.location else None,
            "model": plan.model if plan else None,
            "n_layers": plan.n_layers if plan else None,
            "valid_tp_degrees": plan.valid_degrees() if plan else None,
            "kv_replication_tp_degrees": plan.replication_degrees if plan else None,
            "binding_constraint": thing.binding or None,
            "not_judged": list(thing.not_judged),
            "dims": [
                {
                    "code": dim.code,
                    "dim": dim.name,
                    "size": dim.size,
                    "axis": dim.axis.value,
                    "layers": list(dim.layers),
                    "places": list(dim.places),
                }
                for dim in (plan.dims if plan else ())
            ],
            "repairs": list(thing.repairs),
            "judgements": [_judgement(judgement) for judgement in thing.judgements],
        }

    def ending(self) -> dict[str, Any]:
        """Return the summary."""
        return {"summary": {status.value: number for status, number in self._found.items()}}


def _judgement(judgement: Judgement) -> dict[str, Any]:
    error, warnings = judgement.error.settled() if judgement.error else None, judgement.warnings
    # asdict() would copy the layers of every violation, number by number.
    return {
        "degrees": dict(vars(judgement.degrees)),
        "compatible": error is None,
        "in_world": judgement.in_world,
        "bytes_per_rank": None if judgement.state is None else asdict(judgement.state),
        "message": str(error) if error else None,
        "violations": [
            {**vars(violation), "layers": list(violation.layers)}
            for violation in (error.violations if error else ())
        ],
        "problems": [dict(vars(problem)) for problem in (*(error.problems if error else ()), *warnings)],
    }


def concise(report: Report) -> str:
    """Return the verdict in one line."""
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
            told = "".join(f" Warning: {problem.warning}" for problem in judgement.warnings)
            told = f" {judgement.state.gib} GiB per rank.{told}" if judgement.state else told
            if report.repairs:
                told = f" Repaired: {', '.join(report.repairs)}.{told}"
            verdict = f"{report.name}: {_requested(report, judgement)} fits{model}{by}."
            return verdict + _works(report) + told + not_judged(report)
        broken = [f"{v.code} {v.dim} = {v.size} {v.problem} in {v.where}" for v in judgement.error.violations]
        broken += [f"{problem.code} {problem.text}" for problem in judgement.error.problems]
        verdict = f"{report.name}: {_requested(report, judgement)} does not fit{by}: {'; '.join(broken)}."
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
    """Return which rules the verdict leaves out and why, as a sentence behind it, or nothing."""
    left_out = [rule.removesuffix(".") for rule in report.not_judged]
    told = any(rule.startswith("EP001") for rule in left_out)
    ep = max((judgement.degrees.ep for judgement in report.judgements), default=1)
    experts = f" EP {ep} was not judged: no experts were found." if ep > 1 and not told else ""
    if report.plan is None or _has_experts(report.plan):
        experts = ""
    return experts + (f" Not validated: {'; '.join(left_out)}." if left_out else "")


def _has_experts(plan: Plan) -> bool:
    return any(dim.axis is Axis.EP for dim in plan.dims)


def _problems(report: Report) -> Iterator[Line]:
    if len(report.judgements) > 1:
        yield concise(report), BAD
        return
    yield f"{report.name} (by {possessive(report.framework)} rule):", ""
    error = report.judgements[0].error
    assert error is not None
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
    """Return the degrees that the verdict is about: EP only where experts were judged by it."""
    degrees = judgement.degrees
    judged = report.plan is None or _has_experts(report.plan)
    return f"TP {degrees.tp}" + (f" with EP {degrees.ep}" if degrees.ep > 1 and judged else "")


def _works(report: Report, of: str = "") -> str:
    if report.plan is None or not report.plan.dims:
        return " Nothing of it is split: every degree works." if of else ""
    return f" Degrees that work{of}: {', '.join(map(str, report.plan.valid_degrees()))}."
