"""What a command found, as data: `Report` per model, config or file, and the exit status of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import TPCompatError
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.validate import compat_error, raise_if_unread

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
class Location:
    """Where the degree, or the dimension, is written.

    Attributes:
        file: its path.
        line: counted from 1, where it is known.
    """

    file: str
    line: int | None = None


@dataclass(frozen=True)
class Judgement:
    """The verdict on one choice of degrees.

    Attributes:
        degrees: the choice.
        error: what is wrong with it, or None.
        in_world: whether its TP degree divides the number of ranks, where that was given.
    """

    degrees: Degrees
    error: TPCompatError | None
    in_world: bool = True


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

    @property
    def not_judged(self) -> tuple[str, ...]:
        """What the verdict leaves out, and why."""
        rules = self.plan.not_judged if self.plan else ()
        return (*rules, self.assumed) if self.assumed else rules

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


def judge(plan: Plan, choices: Iterable[Degrees], world_size: int | None = None) -> tuple[Judgement, ...]:
    """The verdict of the engine on each choice of degrees.

    Raises:
        PlanError: a choice seems to fit, but part of the model could not be read.
    """
    judgements = []
    for choice in choices:
        error = compat_error(plan, choice)
        if error is None:
            raise_if_unread(plan.at(choice))
        judgements.append(Judgement(choice, error, world_size is None or world_size % choice.tp == 0))
    return tuple(judgements)


class Tally:
    """How many reports there are of each status, counted as they go by: none is kept."""

    def __init__(self) -> None:
        self._found = dict.fromkeys(Status, 0)

    def watch(self, reports: Iterable[Report]) -> Iterator[Report]:
        """Hand the reports on, each counted."""
        for report in reports:
            self._found[report.status] += 1
            yield report

    def counts(self) -> dict[str, int]:
        """Return how many there were of each status, under its name."""
        return {status.value: number for status, number in self._found.items()}

    @property
    def judged_none(self) -> bool:
        """Whether everything was skipped."""
        return not any(number for status, number in self._found.items() if status is not Status.SKIPPED)

    @property
    def exit_status(self) -> int:
        """0 when all that was judged fits, 1 when something does not, 2 when something was not judged."""
        if self._found[Status.NOT_VALIDATED]:
            return 2
        return 1 if self._found[Status.INCOMPATIBLE] else 0


def tally(reports: Iterable[Report]) -> Tally:
    """Return the tally of these reports."""
    found = Tally()
    for _ in found.watch(reports):
        pass
    return found


def exit_status(reports: Iterable[Report]) -> int:
    """Return the exit status of these reports, as `Tally.exit_status`."""
    return tally(reports).exit_status


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


def as_json(command: str, reports: Sequence[Report]) -> dict[str, Any]:
    """The document of ``--output-format json``; ``schema.json`` beside this file describes it."""
    from torchtitan_tp_validate import __version__

    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "tp-validate", "version": __version__},
        "command": command,
        "summary": tally(reports).counts(),
        "results": [_result(report) for report in reports],
    }


def _result(report: Report) -> dict[str, Any]:
    plan = report.plan
    return {
        "name": report.name,
        "group": report.group or None,
        "status": report.status.value,
        "framework": report.framework,
        "reason": report.note or None,
        "location": asdict(report.location) if report.location else None,
        "model": plan.model if plan else None,
        "n_layers": plan.n_layers if plan else None,
        "valid_tp_degrees": plan.valid_degrees() if plan else None,
        "kv_replication_tp_degrees": plan.replication_degrees if plan else None,
        "binding_constraint": report.binding or None,
        "not_judged": list(report.not_judged),
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
        "judgements": [_judgement(judgement) for judgement in report.judgements],
    }


def _judgement(judgement: Judgement) -> dict[str, Any]:
    error = judgement.error.settled() if judgement.error else None
    # asdict() would copy the layers of every violation, number by number.
    return {
        "degrees": dict(vars(judgement.degrees)),
        "compatible": error is None,
        "in_world": judgement.in_world,
        "message": str(error) if error else None,
        "violations": [
            {**vars(violation), "layers": list(violation.layers)}
            for violation in (error.violations if error else ())
        ],
    }
