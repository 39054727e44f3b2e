"""What goes wrong, as data first and as text second.

Every error here is a `ValueError`, since each is about a value that the user set.
"""

from __future__ import annotations

from dataclasses import dataclass


class TPValidateError(ValueError):
    """Base of every error that this package raises on purpose."""


class TPDegreeError(TPValidateError):
    """The TP degree itself is not a positive whole number."""


class PlanError(TPValidateError):
    """The object's sharded dimensions could not be read, so nothing was validated."""


class InstallError(TPValidateError):
    """``install(strict=True)`` found an entry point that it cannot guard."""


class NotValidatedWarning(UserWarning):
    """Something was let through without a verdict; the text says what and why."""


@dataclass(frozen=True)
class Violation:
    """One sharded dimension that the TP degree does not divide.

    Attributes:
        code: rule code, e.g. ``TP002``.
        dim: torchtitan's name of the dimension, e.g. ``n_kv_heads``.
        size: its global size, in heads.
        layers: indices of the layers that have it.
        where: the same for people, e.g. ``layers 3, 7, ..., 39 (10 of 40)``.
        why: why an uneven split cannot work.
        consequence: what the run would have done.
    """

    code: str
    dim: str
    size: int
    layers: tuple[int, ...]
    where: str
    why: str
    consequence: str


class TPCompatError(TPValidateError):
    """The TP degree does not divide a dimension that the model's plan shards.

    The text is the same on every rank: it depends on the model and the degree alone.

    Attributes:
        tp: the degree that was asked for.
        model: the model's name.
        violations: every `Violation`, the tightest dimension first.
        valid_degrees: the degrees that work, ascending.
        how_to_change: the flag to change, in the spelling of the torchtitan line at hand.
    """

    def __init__(
        self,
        *,
        tp: int,
        model: str,
        violations: tuple[Violation, ...],
        valid_degrees: list[int],
        how_to_change: str,
    ) -> None:
        self.tp = tp
        self.model = model
        self.violations = violations
        self.valid_degrees = valid_degrees
        self.how_to_change = how_to_change
        super().__init__(self._text())

    def __reduce__(self) -> tuple[object, ...]:
        # BaseException would call the class with its positional args; ours are keywords.
        return _rebuild, (
            {
                "tp": self.tp,
                "model": self.model,
                "violations": self.violations,
                "valid_degrees": self.valid_degrees,
                "how_to_change": self.how_to_change,
            },
        )

    @property
    def headline(self) -> str:
        """The first line of the text, in the words of upstream issue #2574."""
        worst = self.violations[0]
        return (
            f"Tensor parallel degree ({self.tp}) must divide {worst.dim} ({worst.size}). "
            f"For {self.model}, max supported TP is {self.valid_degrees[-1]}."
        )

    def _text(self) -> str:
        lines = [self.headline, ""]
        for violation in self.violations:
            lines += [
                f"  {violation.code} {violation.dim} = {violation.size} is not a multiple of {self.tp}, "
                f"in {violation.where}:",
                f"        {violation.why}.",
            ]
        lines.append("")
        for consequence in dict.fromkeys(violation.consequence for violation in self.violations):
            lines.append(f"Without this check: {consequence}")
        lines += [
            f"Degrees that work: {', '.join(map(str, self.valid_degrees))}.",
            f"To change it: {self.how_to_change}",
        ]
        return "\n".join(lines)


def _rebuild(fields: dict[str, object]) -> TPCompatError:
    return TPCompatError(**fields)  # type: ignore[arg-type]
