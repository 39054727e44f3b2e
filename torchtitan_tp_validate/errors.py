"""What goes wrong, as data first and as text second.

Every error here is a `ValueError`, since each is about a value that the user set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


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


class InstallWarning(UserWarning):
    """``install()`` could not guard something; the text says what and why."""


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
        return "\n".join([*lines, self.advice])


_WIDTH = 103
"""Columns of a sentence that is wrapped."""


def _wrapped(text: str) -> str:
    """Return the same in lines that fit; an error message that it quotes stays whole, to be searched for."""
    import textwrap  # not for those that have nothing to refuse

    unbroken = re.sub(r'"[^"]*"', lambda quoted: quoted[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(
        unbroken, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_NO_BREAK, " ")


_NO_BREAK = "\N{NO-BREAK SPACE}"


class TPCompatError(TPValidateError):
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
        advice: the last lines: what works, and the flag to change in the spelling of the installed line.
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
    ) -> None:
        super().__init__()
        refusal = Refusal(violations, valid_degrees, list(replication_degrees), headline, advice)
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
    def violations(self) -> tuple[Violation, ...]:
        """Every violation, the tightest dimension first."""
        return self._tell().violations

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
