"""The wrapper itself: the same function, with the check in front of it."""

from __future__ import annotations

import functools
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torchtitan_tp_validate.degrees import Degrees, applies_fsdp, degrees_of_call, training_of_call
from torchtitan_tp_validate.errors import InstallError, PlanError
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.locate import (
    REQUIRED_PARAMETERS,
    EntryPoint,
    unbindable_function,
)
from torchtitan_tp_validate.notices import warn_once
from torchtitan_tp_validate.releases import kv_replication_of, line_of
from torchtitan_tp_validate.shape import PLACES, is_own, own_entry_points, own_name
from torchtitan_tp_validate.validate import judge
from torchtitan_tp_validate.wrappers import TARGETS


class Switches(Protocol):
    """What a guard asks at each call, see `torchtitan_tp_validate.guards.Guards`."""

    active: bool
    replicate_kv_heads: bool
    fix_tp_plan: bool


@dataclass(frozen=True)
class Guardable(EntryPoint, ABC):
    """An entry point that knows how to guard itself.

    Attributes:
        model: what it is the entry point of: the name of a wrapper, or ``transformers``.
    """

    model: str = ""

    @property
    def bound(self) -> Any:
        """What its name stands for now, or None while its module is not loaded."""
        module = sys.modules.get(self.module)
        return None if module is None else vars(module).get(self.function)

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be guarded: by its source, or by what its loaded module holds instead."""
        if self.problem is not None or self.module not in sys.modules:
            return self.problem
        function = self.bound
        if function is None:
            return "its module is loaded, but does not hold it (yet)"
        return self.unbindable(function)

    @abstractmethod
    def unbindable(self, function: Callable[..., Any]) -> str | None:
        """Why this live function cannot be guarded, or None when it can."""

    @abstractmethod
    def guard(self, function: Callable[..., Any], switches: Switches) -> Callable[..., Any]:
        """Return the same function with the check in front of it."""

    def beside_the_check(self, switches: Switches) -> str:
        """Return what else is done to its calls, in words that follow "guarded"."""
        return ""


class ParallelizeFunction(Guardable):
    """A function of torchtitan, or of somebody's own, that parallelizes a model."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> ParallelizeFunction:
        """Return the entry point of a function of somebody's own."""
        return cls(function.__module__, function.__qualname__, None, own_name(function.__module__))

    def unbindable(self, function: Callable[..., Any]) -> str | None:
        """Why this live function cannot be guarded, or None when it can."""
        return unbindable_function(function)

    def guard(self, function: Callable[..., Any], switches: Switches) -> Callable[..., Any]:
        """Return the same function with the check in front of it."""
        return guard(
            function,
            active=lambda: switches.active,
            replicate_kv_heads=lambda: switches.replicate_kv_heads,
        )

    def beside_the_check(self, switches: Switches) -> str:
        """Return what else is done to its calls, in words that follow "guarded"."""
        return "" if self.model in TARGETS else ", by its shape"


def parallelize_functions() -> Iterator[ParallelizeFunction]:
    """Return every parallelize function of the installed torchtitan: those listed, then a fork's own."""
    for model, target in TARGETS.items():
        for point in target.entry_points():
            yield ParallelizeFunction(point.module, point.function, point.problem, model)
    for place in PLACES:
        for point in own_entry_points(place):
            yield ParallelizeFunction(point.module, point.function, point.problem, own_name(point.module))


def guardable_functions() -> list[Callable[..., Any]]:
    """Return the functions that `install` would guard, as far as they are loaded; it installs nothing.

    That would look through every object of the process.
    """
    return [point.bound for point in parallelize_functions() if point.bound and not point.obstacle]


def guard(
    function: Callable[..., Any],
    *,
    active: Callable[[], bool] = lambda: True,
    replicate_kv_heads: Callable[[], bool] = lambda: False,
) -> Callable[..., Any]:
    """Return a drop-in replacement of a parallelize function that checks before anything is touched.

    It keeps the signature, name and docstring of ``function`` and returns what ``function`` returns.

    Args:
        function: any function with the parameters ``model`` and ``parallel_dims``.
        active: asked at each call; when it says no, the call goes straight through.
        replicate_kv_heads: asked at each call; when it says yes, ranks may share key-value heads.

    Raises:
        InstallError: ``function`` lacks one of the two parameters.
    """
    problem = unbindable_function(function)
    if problem is not None:
        raise InstallError(f"{problem}, so it cannot be guarded.")
    signature = inspect.signature(function)
    own = is_own(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if active():
            arguments = _arguments(signature, args, kwargs)
            degrees = replace(
                degrees_of_call(arguments),
                fsdp=applies_fsdp(function),
                by_own_function=own,
                replicate_kv_heads=replicate_kv_heads(),
            )
            check(arguments["model"], degrees, of_a_run=training_of_call(arguments) is not None)
            if degrees.replicate_kv_heads and degrees.tp > 1:
                replication = kv_replication_of(line_of(arguments["model"]))
                replication.put_into_call(function, arguments, degrees.tp)
        return function(*args, **kwargs)

    return guarded


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Name -> value of a call's arguments, those that a ``*args`` or ``**kwargs`` hides included.

    Raises:
        TypeError: the call does not fit the signature, as the function itself would say.
    """
    signature.bind(*args, **kwargs)
    by_position = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    # In every release the model comes first, and the parallel dims second unless by keyword.
    names = (*by_position, *REQUIRED_PARAMETERS[len(by_position) :])
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check(model_or_config: Any, degrees: Degrees, *, of_a_run: bool = False) -> None:
    """`validate_tp_compat`, except that what cannot be read is let through with a warning.

    A guard must not stop a run that may well work: that it was not validated is said aloud instead, once.

    Args:
        of_a_run: whether the call brought what a run brings: then a rule that was left out for want of
            it is told too.
    """
    try:
        plan = judge(model_or_config, degrees)
    except PlanError as error:
        warn_once(f"{error} The run goes on unchecked.", error.reason)
        return
    if plan is not None and plan.not_judged and of_a_run:
        left_out = "; ".join(plan.not_judged)
        warn_once(f"Not validated: {left_out}. All other rules were applied to {plan.model}.", left_out)


def drop_in(module_name: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a wrapper module, which gives the guarded function of a family.

    The function is looked up in the installed torchtitan at first use, so that importing a wrapper module
    does not load torchtitan, and is then kept in the module under our name and all of upstream's.

    Args:
        module_name: the wrapper module, whose last part is the name of the family.
    """

    def __getattr__(attribute: str) -> Any:
        """Return the guarded function.

        Raises:
            AttributeError: ``attribute`` is neither our name of the function nor one of upstream's.
            ImportError: the installed torchtitan has no such entry point.
        """
        target = TARGETS[module_name.rpartition(".")[2]]
        names = dict.fromkeys((target.name, *target.functions))
        if attribute not in names:
            raise AttributeError(f"module {module_name!r} has no attribute {attribute!r}")
        # Deferred: it looks for torchtitan by means of this package.
        from torchtitan_tp_validate.supported import unsupported_torchtitan

        unsupported = unsupported_torchtitan()
        if unsupported is not None:
            raise ImportError(unsupported)
        entry_point = next(target.entry_points(), None)
        if entry_point is None:
            identity = torchtitan_identity()
            name = "(not installed)" if identity.version is None else identity.name
            raise ImportError(
                f"torchtitan {name} has no {target.name}: looked for "
                f"{' or '.join(target.functions)} in {' and '.join(target.packages)}."
            )
        guarded = guard(entry_point.load())
        # Pickled by reference, a function must be found where it says it lives.
        guarded.__module__, guarded.__qualname__ = module_name, target.name
        vars(sys.modules[module_name]).update(dict.fromkeys(names, guarded))
        return guarded

    return __getattr__
