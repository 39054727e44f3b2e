"""Check native tensor parallelism where transformers distributes a model, before it reads any weight.

Every release has one function that is called for it, and only when a degree was asked for, so that the
guard costs nothing else. It is found by looking at the files, not by a version number.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import NotValidatedWarning, PlanError
from torchtitan_tp_validate.locate import functions_in, package_folder
from torchtitan_tp_validate.releases import huggingface
from torchtitan_tp_validate.releases.transformers_plans import TPPlan, release, transformers_version
from torchtitan_tp_validate.transformers_tp.fix import settle
from torchtitan_tp_validate.transformers_tp.model import effective_plan
from torchtitan_tp_validate.validate import raise_if_incompatible
from torchtitan_tp_validate.wrappers.guard import Guardable, Switches

FIRST_RELEASE, LAST_RELEASE = (5, 2), (5, 23)
"""The first and the last transformers release that the guard was read and tested with."""

_PLAIN_BACKEND = "transformers.integrations.tensor_parallel"
# (module, function), the newest first: from 5.16, in 5.15, up to 5.14.
_WHERE = (
    ("transformers.distributed.tensor_parallel", "apply_tensor_parallelism"),
    (_PLAIN_BACKEND, "apply_tensor_parallelism"),
    (_PLAIN_BACKEND, "distribute_model"),
)
_MESHES = ("tp_mesh", "device_mesh")

# Up to 5.14 the size is an argument of its own.
_TP_SIZE = ('tp_size={degree}, as in from_pretrained(..., tp_plan="auto", tp_size={degree})',)


class DistributingFunction(Guardable):
    """The function of transformers that distributes a model over a mesh."""

    def unbindable(self, function: Callable[..., Any]) -> str | None:
        """Why this live function cannot be guarded, or None when it can."""
        name = getattr(function, "__name__", repr(function))
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError) as error:
            return f"the signature of {name} cannot be read: {error}"
        return _unbindable(name, tuple(parameters))

    def guard(self, function: Callable[..., Any], switches: Switches) -> Callable[..., Any]:
        """Return the same function with the check in front of it."""
        return guard(function, active=lambda: switches.active, fixes=lambda: switches.fix_tp_plan)

    def beside_the_check(self, switches: Switches) -> str:
        """Return what else is done to its calls, in words that follow "guarded"."""
        return ", and plans are completed" if switches.fix_tp_plan else ""


def distributing_functions() -> Iterator[DistributingFunction]:
    """Return the function that distributes a model in the installed transformers, if there is any."""
    folder = package_folder("transformers")
    if folder is None:
        return
    for module, function in _WHERE:
        file = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
        parameters = functions_in(file).get(function) if file.is_file() else None
        if parameters is not None:
            yield DistributingFunction(module, function, _unbindable(function, parameters), "transformers")
            return
    looked = " or ".join(f"{module}.{function}" for module, function in _WHERE)
    yield DistributingFunction(*_WHERE[0], f"it is gone (looked for {looked})", "transformers")


def problems() -> list[str]:
    """Return what speaks against the guard in the installed transformers, a sentence each."""
    version = transformers_version()
    found = [
        f"{point} is not guarded: {point.problem}."
        for point in distributing_functions()
        if point.problem is not None
    ]
    if version is not None and not found and not FIRST_RELEASE <= release(version) <= LAST_RELEASE:
        first, last = (".".join(map(str, bound)) for bound in (FIRST_RELEASE, LAST_RELEASE))
        found.append(
            f"transformers {version} is not a release that the guard was tested with ({first} to {last}): "
            f"{', '.join(map(str, distributing_functions()))} was found in it and is guarded."
        )
    return found


def guard(
    function: Callable[..., Any],
    *,
    active: Callable[[], bool] = lambda: True,
    fixes: Callable[[], bool] = lambda: False,
) -> Callable[..., Any]:
    """Return the same function, with the check in front of it.

    Args:
        function: transformers' own, with the parameters ``model`` and ``tp_mesh`` or ``device_mesh``.
        active: asked at each call; when it says no, the call goes straight through.
        fixes: asked at each call: whether plans are being completed, see
            `torchtitan_tp_validate.transformers_tp.fix`.
    """
    signature = inspect.signature(function)
    plain = function.__module__ == _PLAIN_BACKEND
    how_to_change = _TP_SIZE if function.__name__ == "distribute_model" else None

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if active():
            arguments = signature.bind(*args, **kwargs).arguments
            model = arguments["model"]
            tp = next(arguments[mesh] for mesh in _MESHES if mesh in arguments).size()
            check(model, _plan(arguments), tp, how_to_change)
            if fixes() and plain:
                settle(model, tp)
        return function(*args, **kwargs)

    return guarded


def check(model: Any, plan: TPPlan, tp: int, how_to_change: tuple[str, ...] | None = None) -> None:
    """Refuse a degree that the heads of a model do not fit under this plan.

    A model that cannot be read is let through with a warning: a guard must not stop a run that may well work.

    Args:
        how_to_change: the advice, when it is not that of the newest release.

    Raises:
        TPCompatError: the degree does not fit.
    """
    if tp == 1:
        return
    try:
        config = huggingface.find_config(model)
        if config is None:
            raise PlanError(f"{type(model).__name__} has no config.")
        read = huggingface.read(config, model, Degrees(tp=tp), tp_plan=plan)
        raise_if_incompatible(
            replace(read, how_to_change=how_to_change or read.how_to_change), Degrees(tp=tp)
        )
    except PlanError as error:
        warnings.warn(f"{error} The model is loaded unchecked.", NotValidatedWarning, stacklevel=3)


def _plan(arguments: dict[str, Any]) -> TPPlan:
    """Return the plan that a call is about to apply: its own argument, else the model's."""
    model, plan, config = (arguments.get(name) for name in ("model", "tp_plan", "distributed_config"))
    # Up to 5.14 the config is set on the model, and so asked, only inside the call.
    expert = config.get if isinstance(config, dict) else functools.partial(getattr, config)
    if config is not None and expert("enable_expert_parallel", False):
        return model._ep_plan or {}  # type: ignore[union-attr]
    return plan if isinstance(plan, dict) else effective_plan(model)


def _unbindable(function: str, parameters: tuple[str, ...]) -> str | None:
    if "model" in parameters and any(mesh in parameters for mesh in _MESHES):
        return None
    return f"{function}({', '.join(parameters)}) takes no model and no {' or '.join(_MESHES)}"
