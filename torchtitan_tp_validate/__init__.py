"""Refuse a tensor parallel degree that does not fit the model, before a torchtitan run starts."""

from torchtitan_tp_validate.errors import (
    NotValidatedWarning,
    PlanError,
    TPCompatError,
    TPDegreeError,
    TPValidateError,
    Violation,
)
from torchtitan_tp_validate.validate import valid_tp_degrees, validate_tp_compat

__version__ = "0.1.0"

__all__ = [
    "NotValidatedWarning",
    "PlanError",
    "TPCompatError",
    "TPDegreeError",
    "TPValidateError",
    "Violation",
    "valid_tp_degrees",
    "validate_tp_compat",
]
