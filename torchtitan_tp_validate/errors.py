"""What goes wrong, as data first and as text second.

Every error here is a `ValueError`, since each is about a value that the user set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TPValidateError(ValueError):
    """Base of every error that this package raises on purpose."""


class TPDegreeError(TPValidateError):
    """A parallel degree itself is not a positive whole number."""


class PlanError(TPValidateError):
    """The object's sharded dimensions could not be read, so nothing was validated."""


class NotAModelConfigError(PlanError):
    """The object is no config of a model at all, so that there was nothing to validate."""


class KVReplicationError(TPValidateError):
    """KV-head replication was asked for, and cannot be had with this model or this run."""


class InstallError(TPValidateError):
    """``install(strict=True)`` found an entry point that it cannot guard."""


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


class TPCompatError(TPValidateError):
    """A degree does not fit a dimension that the model's plan splits.

    The text is the same on every rank: it depends on the model and the degrees alone.

    Attributes:
        tp: the TP degree that was asked for.
        model: the model's name.
        violations: every `Violation`, the tightest dimension first.
        valid_degrees: the TP degrees that work, ascending.
        replication_degrees: the TP degrees that KV-head replication would add, ascending.
        headline: the first line of the text, in the words of upstream issue #2574.
        advice: the last lines: what works, and the flag to change in the spelling of the line at hand.
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
        self.tp = tp
        self.model = model
        self.violations = violations
        self.valid_degrees = valid_degrees
        self.replication_degrees = list(replication_degrees)
        self.headline = headline
        self.advice = advice
        super().__init__(self._text())

    def __reduce__(self) -> tuple[object, ...]:
        # BaseException would call the class with its positional args; ours are keywords.
        fields = ("tp", "model", "violations", "valid_degrees", "headline", "advice", "replication_degrees")
        return _rebuild, ({field: getattr(self, field) for field in fields},)

    def _text(self) -> str:
        lines = [self.headline, ""]
        for violation in self.violations:
            lines += [
                f"  {violation.code} {violation.dim} = {violation.size} {violation.problem}, "
                f"in {violation.where}:",
                f"        {violation.why}.",
            ]
        lines.append("")
        for consequence in dict.fromkeys(violation.consequence for violation in self.violations):
            lines.append(f"Without this check: {consequence}")
        return "\n".join([*lines, self.advice])


def _rebuild(fields: dict[str, object]) -> TPCompatError:
    return TPCompatError(**fields)  # type: ignore[arg-type]
