"""Refuse a tensor parallel degree that does not fit the model, before a torchtitan run starts.

The check itself (`validate_tp_compat`, `valid_tp_degrees`) is arithmetic on the configuration and loads
neither torch nor torchtitan. `install` puts it in front of torchtitan's own entry points.

Names are imported when they are first used: the command line starts faster without those it never needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtitan_tp_validate.errors import (
        InstallError,
        InstallWarning,
        KVReplicationError,
        NotValidatedWarning,
        PlanError,
        Problem,
        RunError,
        TPCompatError,
        TPDegreeError,
        TPValidateError,
        Violation,
    )
    from torchtitan_tp_validate.guards import (
        Installation,
        TargetState,
        install,
        installed,
        uninstall,
        validate_job,
    )
    from torchtitan_tp_validate.validate import valid_tp_degrees, validate_tp_compat

__version__ = "0.1.0"

__all__ = [
    "InstallError",
    "InstallWarning",
    "Installation",
    "KVReplicationError",
    "NotValidatedWarning",
    "PlanError",
    "Problem",
    "RunError",
    "TPCompatError",
    "TPDegreeError",
    "TPValidateError",
    "TargetState",
    "Violation",
    "install",
    "installed",
    "uninstall",
    "valid_tp_degrees",
    "validate_job",
    "validate_tp_compat",
]

_IN_GUARDS = {"Installation", "TargetState", "install", "installed", "uninstall", "validate_job"}
_IN_VALIDATE = {"valid_tp_degrees", "validate_tp_compat"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "guards" if name in _IN_GUARDS else "validate" if name in _IN_VALIDATE else "errors"
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
