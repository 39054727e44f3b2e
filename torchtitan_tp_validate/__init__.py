"""Refuse a tensor parallel degree that does not fit the model, before a torchtitan run starts.

The check itself (`validate_tp_compat`, `valid_tp_degrees`) is arithmetic on the configuration and loads
neither torch nor torchtitan. `install` puts it in front of torchtitan's own entry points.
"""

from torchtitan_tp_validate.errors import (
    InstallError,
    InstallWarning,
    KVReplicationError,
    NotValidatedWarning,
    PlanError,
    TPCompatError,
    TPDegreeError,
    TPValidateError,
    Violation,
)
from torchtitan_tp_validate.install import Installation, TargetState, install, installed, uninstall
from torchtitan_tp_validate.validate import valid_tp_degrees, validate_tp_compat

__version__ = "0.1.0"

__all__ = [
    "InstallError",
    "InstallWarning",
    "Installation",
    "KVReplicationError",
    "NotValidatedWarning",
    "PlanError",
    "TPCompatError",
    "TPDegreeError",
    "TPValidateError",
    "TargetState",
    "Violation",
    "install",
    "installed",
    "uninstall",
    "valid_tp_degrees",
    "validate_tp_compat",
]
