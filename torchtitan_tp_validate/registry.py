"""What a torchtitan, or a user's own package, registers: models, their flavors, and training configs.

0.2.x has a train spec per model (``get_train_spec()``), whose ``model_args`` holds the flavors, and keeps
its training configs in TOML files. 0.3.x has a ``model_registry(flavor)`` beside a table of flavors, and
the training configs are functions of a ``config_registry`` module.

Source: ``models/__init__.py``, ``experiments/__init__.py`` and ``config/manager.py`` (how ``--module`` is
found) of torchtitan 0.2.2 and 0.3.0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.errors import UnavailableError, UnknownNameError
from torchtitan_tp_validate.locate import package_folder
from torchtitan_tp_validate.supported import how_to_get, missing_import, unsupported_torchtitan

_PREFIXES = ("torchtitan.models", "torchtitan.experiments", "torchtitan.experiments.rl.examples")
_CONFIGS = "config_registry"


@dataclass(frozen=True)
class Model:
    """A registered model.

    Attributes:
        name: what torchtitan calls it, e.g. ``llama3`` or ``graph_trainer.llama3``.
        flavors: flavor -> a callable that gives its spec.
    """

    name: str
    flavors: dict[str, Callable[[], Any]]

    def spec(self, flavor: str) -> Any:
        """The spec of one flavor.

        Raises:
            UnknownNameError: there is no such flavor.
        """
        if flavor not in self.flavors:
            raise UnknownNameError("flavor", flavor, list(self.flavors), self.name)
        return self.flavors[flavor]()


def names() -> list[str]:
    """Every model and experiment that the installed torchtitan lists, those without a model included.

    Raises:
        UnavailableError: there is no torchtitan, or none that is supported.
    """
    problem = unsupported_torchtitan()
    if problem is not None:
        raise UnavailableError(problem)
    return sorted(set(_listed("models")) | set(_listed("experiments")))


def is_model(name: str) -> bool:
    """Whether torchtitan lists it among its models rather than its experiments."""
    return name in _listed("models")


def model(name: str) -> Model:
    """The flavors of a model: one that torchtitan lists, or a package of the user's own.

    Raises:
        UnknownNameError: there is no such model.
        UnavailableError: it cannot be imported here, or has no registry of its own.
    """
    package = _package(name, "")
    if hasattr(package, "get_train_spec"):
        spec = package.get_train_spec()
        return Model(name, dict.fromkeys(spec.model_args, lambda: spec))
    registry = getattr(package, "model_registry", None)
    if registry is None:
        raise UnavailableError(f"{name} registers no model of its own.")
    table = _flavor_table(package) or _flavor_table(_package(name.rpartition(".")[2], ""))
    if table is None:
        raise UnavailableError(f"{name} has no table of flavors.")
    return Model(name, {flavor: functools.partial(registry, flavor) for flavor in table})


def model_config(spec: Any, flavor: str) -> Any:
    """The config (0.3.x) or model args (0.2.x) of a flavor's spec."""
    return spec.model_args[flavor] if hasattr(spec, "model_args") else spec.model


def configs(name: str, *, own: bool = True) -> dict[str, Callable[[], Any]]:
    """Training config -> the function that builds it, of a 0.3.x module or a user's own.

    Args:
        own: leave out what the module imported from others.

    Raises:
        UnknownNameError: there is no such module.
        UnavailableError: it cannot be imported here, or registers no config.
    """
    module = _package(name, f".{_CONFIGS}")
    found: dict[str, Callable[[], Any]] = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and not key.startswith("_")
        if not own or value.__module__ == module.__name__
        if all(p.default is not p.empty for p in inspect.signature(value).parameters.values())
    }
    if not found:
        raise UnavailableError(f"{module.__name__} has no training config.")
    return found


def has_configs() -> bool:
    """Whether the installed torchtitan registers its training configs as functions (0.3.x)."""
    spec = importlib.util.find_spec("torchtitan")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any(next(Path(folder, "models").glob(f"*/{_CONFIGS}.py"), None) for folder in folders)


def _listed(kind: str) -> frozenset[str]:
    try:
        package = importlib.import_module(f"torchtitan.{kind}")
    except ImportError as error:
        raise UnavailableError(missing_import(error)) from error
    listed: frozenset[str] = getattr(package, f"_supported_{kind}", frozenset())
    return listed


def _package(name: str, suffix: str) -> ModuleType:
    """The module that torchtitan means by a name, or the one with this dotted path."""
    is_listed = name in names()
    if is_listed:
        shipped = [f"{prefix}.{name}" for prefix in _PREFIXES if package_folder(f"{prefix}.{name}")]
        candidates = [f"{package}{suffix}" for package in shipped]
    else:
        candidates = [f"{name}{suffix}", name]  # a package, or a config module itself
    for candidate in candidates:
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            # Not there; as opposed to there, and missing something that it imports.
            if error.name is None or not f"{candidate}.".startswith(f"{error.name}."):
                hint = f" ({how_to_get(error.name)})" if error.name else ""
                raise UnavailableError(f"{candidate} cannot be imported: {error}{hint}") from error
        except Exception as error:  # whatever a module does when it is imported
            raise UnavailableError(f"{candidate} cannot be imported: {error}") from error
    if is_listed:
        raise UnavailableError(f"this torchtitan lists {name}, but does not ship it.")
    raise UnknownNameError("module" if suffix else "model", name, names(), "torchtitan")


def _flavor_table(package: ModuleType) -> dict[str, Any] | None:
    tables = [
        value
        for key, value in vars(package).items()
        if key.endswith(("_configs", "flavors")) and isinstance(value, dict)
    ]
    return tables[0] if len(tables) == 1 else None
