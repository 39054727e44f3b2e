"""What a torchtitan, or a user's own package, registers: models, their flavors, and training configs.

How a package registers them is told by the file of the line in ``releases/``.

Source: ``models/__init__.py``, ``experiments/__init__.py`` and ``config/manager.py`` (how ``--module`` is
found) of torchtitan 0.2.2 and 0.3.0.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.errors import UnavailableError, UnknownNameError
from torchtitan_tp_validate.locate import package_folder
from torchtitan_tp_validate.releases import releases
from torchtitan_tp_validate.releases.base import RequestedModel
from torchtitan_tp_validate.supported import how_to_get, missing_import, unsupported_torchtitan

_PREFIXES = ("torchtitan.models", "torchtitan.experiments", "torchtitan.experiments.rl.examples")


@dataclass(frozen=True)
class Model:
    """A registered model.

    Attributes:
        name: what torchtitan calls it, e.g. ``llama3`` or ``graph_trainer.llama3``.
        flavors: flavor -> a callable that describes it.
    """

    name: str
    flavors: dict[str, Callable[[], RequestedModel]]

    def spec(self, flavor: str) -> RequestedModel:
        """Return the model of one flavor.

        Raises:
            UnknownNameError: there is no such flavor.
        """
        if flavor not in self.flavors:
            raise UnknownNameError("flavor", flavor, list(self.flavors), self.name)
        return replace(self.flavors[flavor](), name=f"{self.name} {flavor}")


def names() -> list[str]:
    """Return every model and experiment that the installed torchtitan lists, those without a model included.

    Raises:
        UnavailableError: there is no torchtitan, or none that is supported.
    """
    problem = unsupported_torchtitan()
    if problem is not None:
        raise UnavailableError(problem)
    return sorted(set(_listed("models")) | set(_listed("experiments")))


def is_model(name: str) -> bool:
    """Return whether torchtitan lists it among its models rather than its experiments."""
    return name in _listed("models")


def model(name: str) -> Model:
    """Return the flavors of a model: one that torchtitan lists, or a package of the user's own.

    Raises:
        UnknownNameError: there is no such model.
        UnavailableError: it cannot be imported here, or has no registry of its own.
    """
    package = _package(name)

    def model_package() -> ModuleType:
        """Return the model's that an experiment is about; somebody's own package is about none."""
        last = name.rpartition(".")[2]
        return _package(last) if last in names() else package

    ways = (line.flavors(package, model_package) for line in releases())
    flavors = next((found for found in ways if found is not None), None)
    if flavors is None:
        raise UnavailableError(f"{name} registers no model of its own.")
    if not flavors:
        raise UnavailableError(f"{name} has no table of flavors.")
    return Model(name, flavors)


def configs(name: str, *, own: bool = True) -> dict[str, Callable[[], Any]]:
    """Training config -> the function that builds it, of a 0.3.x module or a user's own.

    Args:
        own: leave out what the module imported from others.

    Raises:
        UnknownNameError: there is no such module.
        UnavailableError: it cannot be imported here, or registers no config.
    """
    module = config_module(name)
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


def config_module(name: str) -> ModuleType:
    """Return the module whose functions build the training configs of a 0.3.x module or a user's own.

    Raises:
        UnknownNameError: there is no such module.
        UnavailableError: it cannot be imported here.
    """
    return _package(name, *(f".{registry}" for registry in _config_registries()))


def has_configs() -> bool:
    """Return whether the installed torchtitan registers its training configs as functions (0.3.x)."""
    spec = importlib.util.find_spec("torchtitan")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any(
        next(Path(folder, "models").glob(f"*/{registry}.py"), None)
        for folder in folders
        for registry in _config_registries()
    )


def _config_registries() -> list[str]:
    return list(dict.fromkeys(line.CONFIG_REGISTRY for line in releases() if line.CONFIG_REGISTRY))


def _listed(kind: str) -> frozenset[str]:
    try:
        package = importlib.import_module(f"torchtitan.{kind}")
    except ImportError as error:
        raise UnavailableError(missing_import(error)) from error
    listed: frozenset[str] = getattr(package, f"_supported_{kind}", frozenset())
    return listed


def _package(name: str, *suffixes: str) -> ModuleType:
    """Return the module that torchtitan means by a name, or the one with this dotted path."""
    is_listed = name in names()
    if is_listed:
        shipped = [f"{prefix}.{name}" for prefix in _PREFIXES if package_folder(f"{prefix}.{name}")]
        candidates = [f"{package}{suffix}" for package in shipped for suffix in suffixes or ("",)]
    else:
        candidates = [
            *(f"{name}{suffix}" for suffix in suffixes),
            name,
        ]  # a package, or a config module itself
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
    raise UnknownNameError("module" if suffixes else "model", name, names(), "torchtitan")
