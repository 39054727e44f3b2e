"""What goes wrong, as data first and as text second.

Every error here is a `ValueError`, since each is about a value that the user set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan_tp_validate.rules import Line, RunRule


class TPValidateError(ValueError):
    """Base of every error that this package raises on purpose."""


class TPDegreeError(TPValidateError):
    """A parallel degree itself is not a positive whole number."""


class PlanError(TPValidateError):
    """The object's sharded dimensions could not be read, so nothing was validated.

    Attributes:
        reason: what could not be read, in a sentence; the text says before it that nothing was validated.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"Not validated: {self.reason}"


class NotAModelConfigError(PlanError):
    """The object is no config of a model at all, so that there was nothing to validate."""


class TPPlanError(PlanError):
    """Transformers' own tensor parallel plans could not be read or completed; nothing was to be validated."""

    def __str__(self) -> str:
        return self.reason


class KVReplicationError(TPValidateError):
    """KV-head replication was asked for, and cannot be had with this model or this run."""


class RepairError(TPValidateError):
    """A known fault was to be repaired, but its code is not the one that the repair is for."""


class ReplicaError(TPValidateError):
    """The copies of a parameter on several ranks are no longer equal."""


class InstallError(TPValidateError):
    """``install(strict=True)`` found an entry point that it cannot guard."""


class UnavailableError(TPValidateError):
    """Something is registered, but cannot be imported here; the text says why."""


class UnknownNameError(TPValidateError):
    """No model, flavor or config of this name.

    Attributes:
        name: what was asked for.
        known: what there is.
    """

    def __init__(self, kind: str, name: str, known: list[str], where: str) -> None:
        import difflib  # not for those that know the names

        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        there_is = f"; there is {', '.join(sorted(known))}." if known else "."
        meant = f"; did you mean {' or '.join(close)}?" if close else there_is
        super().__init__(f"{where} has no {kind} {name!r}{meant}")
        self.name = name
        self.known = known


class UsageError(TPValidateError):
    """The command line asks for something that cannot be done; the text says what to do."""


class NotReadError(TPValidateError):
    """torchtitan does not read what it was given; the text says why."""


class UnreadableError(TPValidateError):
    """A file cannot be read as what it should be, or not be written; the text names it.

    Attributes:
        text: the file's text, where it is text and the language alone is wrong.
        missing: whether there is no such file.
    """

    def __init__(self, message: str, *, text: str | None = None, missing: bool = False) -> None:
        super().__init__(message)
        self.text = text
        self.missing = missing


class OutputError(TPValidateError):
    """Standard output does not take the result; the text says why."""


class RehearsalError(TPValidateError):
    """A run cannot be rehearsed; the text says why.

    Attributes:
        output: the end of what the process that tried has written, where that says more.
    """

    def __init__(self, text: str, output: str = "") -> None:
        super().__init__(f"{text.removesuffix('.')}.")
        self.output = output


class ShrinkError(RehearsalError):
    """A model cannot be made small, since something of it is not known; the text names the field."""


class NotValidatedWarning(UserWarning):
    """Something was let through without a verdict; the text says what and why."""


class RunWarning(UserWarning):
    """A run may go on, and does something that its owner should know; the text says what."""


class InstallWarning(UserWarning):
    """``install()`` could not guard something; the text says what and why."""


@dataclass(frozen=True)
class Problem:
    """One reason why a run as a whole cannot work.

    Attributes:
        code: rule code, e.g. ``PP004``.
        text: what is wrong, with its values.
        must: what must hold instead.
        consequence: what the run would have done.
        instead: what to do.
        silent: whether it would have done so without any error.
        warns: whether the run may go on, and is only told.
    """

    code: str
    text: str
    must: str
    consequence: str
    instead: str
    silent: bool = False
    warns: bool = False

    @classmethod
    def of(cls, rule: RunRule, line: Line, text: str, instead: str = "") -> Problem:
        """Return the problem that a broken rule is in a line of torchtitan."""
        otherwise = rule.otherwise[line]
        return cls(
            rule.code,
            text,
            rule.must,
            otherwise.text,
            instead or rule.instead,
            silent=otherwise.silent,
            warns=rule.warns,
        )

    @property
    def warning(self) -> str:
        """What to say of it where the run goes on, in a line."""
        return f"{self.code} {self.text}: {self.consequence}"


@dataclass(frozen=True)
class Violation:
    """One sharded dimension that a degree does not fit.

    Attributes:
        code: rule code, e.g. ``TP002``.
        dim: torchtitan's name of the dimension, e.g. ``n_kv_heads``.
        size: its global size, in heads, or in rows where there are no heads.
        degree: the degree that does not fit.
        problem: what is wrong, e.g. ``is not a multiple of 4``.
        layers: indices of the layers that have it.
        where: the same for people, e.g. ``layers 3, 7, ..., 39 (10 of 40)``.
        why: why such a split cannot work.
        consequence: what the run would have done.
        silent: whether it would have done so without any error.
    """

    code: str
    dim: str
    size: int
    degree: int
    problem: str
    layers: tuple[int, ...]
    where: str
    why: str
    consequence: str
    silent: bool = False


@dataclass(frozen=True)
class Refusal:
    """All that there is to say about degrees that do not fit; see `TPCompatError` for the attributes."""

    violations: tuple[Violation, ...]
    valid_degrees: list[int]
    replication_degrees: list[int]
    headline: str
    advice: str
    problems: tuple[Problem, ...] = ()

    @property
    def text(self) -> str:
        """The same for people, in several lines."""
        lines = [self.headline, ""]
        for violation in self.violations:
            lines += [
                f"  {violation.code} {violation.dim} = {violation.size} {violation.problem}, "
                f"in {violation.where}:",
                f"        {violation.why}.",
            ]
        lines.append("")
        for consequence in dict.fromkeys(violation.consequence for violation in self.violations):
            lines.append(_wrapped(f"Without this check: {consequence}"))
        lines.append(self.advice)
        if self.problems:
            lines += ["", "Beside that, of the run as a whole:", "", *_told(self.problems)]
        return "\n".join(lines)


def _told(problems: Sequence[Problem]) -> list[str]:
    """Return what there is to say of problems, in lines."""
    lines = []
    for problem in problems:
        lines.append(_wrapped(f"  {problem.code} {problem.text}:", "        "))
        lines.append(_wrapped(f"        {problem.must}.", "        "))
    lines.append("")
    for start, said in (("Without this check", "consequence"), ("To change it", "instead")):
        told: dict[str, list[str]] = {}
        for problem in problems:
            told.setdefault(getattr(problem, said), []).append(problem.code)
        for text, codes in told.items():
            of = f" ({', '.join(codes)})" if len(problems) > 1 else ""
            lines.append(_wrapped(f"{start}{of}: {text.removesuffix('.')}."))
    return lines


_WIDTH = 103
"""Columns of a sentence that is wrapped."""


def _wrapped(text: str, indent: str = "  ") -> str:
    """Return the same in lines that fit; an error message that it quotes stays whole, to be searched for."""
    import textwrap  # not for those that have nothing to refuse

    unbroken = re.sub(r'"[^"]*"', lambda quoted: quoted[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(
        unbroken, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_NO_BREAK, " ")


_NO_BREAK = "\N{NO-BREAK SPACE}"


class RunError(TPValidateError):
    """A run cannot work as it is: its layout, its batch, its sequence, or what torchtitan says itself.

    The text is the same on every rank.

    Attributes:
        problems: every `Problem` of the run as a whole, in the order of the rules.
        violations: every `Violation` of a dimension that the model splits; of a `TPCompatError` only.
    """

    violations: Sequence[Violation] = ()

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__()
        self._problems = tuple(problems)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem of the run as a whole, in the order of the rules."""
        return self._problems

    def settled(self) -> RunError:
        """Return the same error, which depends on nothing."""
        return self

    def __str__(self) -> str:
        first, *others = self.problems
        more = f" (and {len(others)} more)" if others else ""
        headline = f"This run cannot work: {first.text}{more}."
        return "\n".join([headline, "", *_told(self.problems)])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)


class TPCompatError(RunError):
    """A degree does not fit a dimension that the model's plan splits.

    The text is the same on every rank: it depends on the model and the degrees alone.

    Attributes:
        tp: the requested TP degree.
        model: the model's name.
        violations: every `Violation`, the tightest dimension first.
        valid_degrees: the TP degrees that are accepted together with the other degrees, ascending. 1 is one
            of them wherever there is no expert parallelism, since a run that splits nothing is not judged.
        replication_degrees: the TP degrees that KV-head replication would add, ascending.
        headline: the first line of the text, in the words of upstream issue #2574.
        advice: what works, and the flag to change in the spelling of the installed line.
        problems: what else speaks against the run, as a whole.
    """

    def __init__(
        self,
        *,
        tp: int,
        model: str,
        violations: tuple[Violation, ...],
        valid_degrees: list[int],
        headline: str,
        advice: str,
        replication_degrees: Sequence[int] = (),
        problems: tuple[Problem, ...] = (),
    ) -> None:
        super().__init__(problems)
        refusal = Refusal(violations, valid_degrees, list(replication_degrees), headline, advice, problems)
        self.tp = tp
        self.model = model
        self._tell: Callable[[], Refusal] = lambda: refusal

    @classmethod
    def told_by(cls, tell: Callable[[], Refusal], *, tp: int, model: str) -> TPCompatError:
        """Return an error that says what it has to say when it is asked, each time.

        A survey of thousands of degrees looks at few of its refusals, and keeps all of them.
        """
        error = cls.__new__(cls)
        error.tp, error.model, error._tell = tp, model, tell
        return error

    def settled(self) -> TPCompatError:
        """Return the same error, which no longer depends on the model."""
        return _rebuild(self._fields())

    @property
    def violations(self) -> tuple[Violation, ...]:  # type: ignore[override]  # told when asked
        """Every violation, the tightest dimension first."""
        return self._tell().violations

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What else speaks against the run, as a whole."""
        return self._tell().problems

    @property
    def valid_degrees(self) -> list[int]:
        """The TP degrees that are accepted together with the other degrees, ascending."""
        return self._tell().valid_degrees

    @property
    def replication_degrees(self) -> list[int]:
        """The TP degrees that KV-head replication would add, ascending."""
        return self._tell().replication_degrees

    @property
    def headline(self) -> str:
        """The first line of the text."""
        return self._tell().headline

    @property
    def advice(self) -> str:
        """The last lines of the text."""
        return self._tell().advice

    def __str__(self) -> str:
        return self._tell().text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        # BaseException would call the class with its positional args; ours are keywords.
        return _rebuild, (self._fields(),)

    def _fields(self) -> dict[str, object]:
        return {"tp": self.tp, "model": self.model, **vars(self._tell())}


def _rebuild(fields: dict[str, object]) -> TPCompatError:
    return TPCompatError(**fields)  # type: ignore[arg-type]
