"""Put the guards in place in the torchtitan and transformers at hand, and take them away again.

``install()`` replaces every known entry point by its guard: in the module that defines it, in every
module that imported it by name, and in every train or model spec built before. Modules imported later
are covered as they are imported. It also guards the Trainer's start, so that a job is refused before
its first process group. ``uninstall()`` puts the original objects back wherever the guard still stands,
and a guard that somebody else wrapped in the meantime goes quiet.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from torchtitan_tp_validate.errors import InstallError, InstallWarning
from torchtitan_tp_validate.failure import recorder
from torchtitan_tp_validate.hf import guard as hf
from torchtitan_tp_validate.hf.fix import PlanFix, ensure_lm_head_plan
from torchtitan_tp_validate.job import check_job
from torchtitan_tp_validate.locate import (
    EntryPoint,
    torchtitan_identity,
    torchtitan_version,
    unbindable_function,
)
from torchtitan_tp_validate.notices import forget
from torchtitan_tp_validate.supported import unsupported_torchtitan
from torchtitan_tp_validate.wrappers import TARGETS
from torchtitan_tp_validate.wrappers.guard import guard

Function = Callable[..., Any]

# 0.3.x defines the Trainer in the first, 0.2.x in the second.
_TRAINER_MODULES = ("torchtitan.trainer", "torchtitan.train")

# What `TargetState.model` says of transformers' native tensor parallelism.
_NATIVE_TP = "transformers"


@dataclass(frozen=True)
class TargetState:
    """Whether one entry point is guarded.

    Attributes:
        model: the wrapper's name, e.g. ``llama3``.
        entry_point: the dotted name of upstream's function, or of the wrapper when there is none.
        guarded: True when a call is checked now, or as soon as its module is imported.
        detail: which of the two, or why not.
        faulty: True when torchtitan has the model, and yet it is not guarded.
    """

    model: str
    entry_point: str
    guarded: bool
    detail: str
    faulty: bool = False

    def __str__(self) -> str:
        return f"{self.model}: {self.entry_point}: {self.detail}"


class Installation:
    """The state of the guards, and a context manager that installs them for a while.

    Leaving the context uninstalls, unless the guards were in place when it was entered.
    """

    def __init__(self) -> None:
        self._was_active: list[bool] = []

    @property
    def active(self) -> bool:
        """Whether the guards are in place."""
        return _active

    @property
    def targets(self) -> tuple[TargetState, ...]:
        """The state of every entry point that this package knows, in the torchtitan at hand."""
        with _lock:
            return tuple(_states())

    @property
    def guarded(self) -> tuple[TargetState, ...]:
        """The entry points whose calls are checked."""
        return tuple(state for state in self.targets if state.guarded)

    @property
    def not_guarded(self) -> tuple[TargetState, ...]:
        """The entry points whose calls are not, and the models that this torchtitan does not have."""
        return tuple(state for state in self.targets if not state.guarded)

    def __bool__(self) -> bool:
        return self.active

    def __str__(self) -> str:
        return "\n".join(map(str, self.targets))

    def __enter__(self) -> Installation:
        with _lock:
            self._was_active.append(_active)
            install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            if not self._was_active.pop():
                uninstall()


def install(
    *, strict: bool = False, replicate_kv_heads: bool = False, fix_tp_plan: bool = False
) -> Installation:
    """Guard every known entry point of the torchtitan at hand, and loading under transformers' native TP.

    Calling it again changes nothing, except that it can switch on what was off.

    Args:
        strict: raise instead of warning when something cannot be guarded; nothing is then installed.
        replicate_kv_heads: let several ranks share a key-value head where the TP degree is a multiple of
            n_kv_heads (see ``kv_replication``). It stays on until `uninstall`. A model of 0.3.x that no
            Trainer builds needs the converter ``ReplicateKVHeads``.
        fix_tp_plan: also complete the plans of transformers models that forget their output head, see
            `torchtitan_tp_validate.hf.ensure_lm_head_plan`.

    Raises:
        InstallError: under ``strict``, naming what cannot be guarded: torchtitan and transformers are both
            missing, one is of an unknown release, or an entry point is gone or has another signature.
    """
    global _active, _replicate_kv_heads, _fixes
    with _lock:
        problems = _problems()
        if strict and problems:
            raise InstallError("Cannot guard everything:\n  " + "\n  ".join(problems))
        was_active, _active = _active, True
        _replicate_kv_heads |= replicate_kv_heads
        _fixes |= fix_tp_plan
        _watch_imports()
        _fix_plans()
        _guard_trainer()
        _guard_loaded()
    if not was_active:
        for problem in problems:
            warnings.warn(problem, InstallWarning, stacklevel=2)
    return Installation()


def uninstall() -> None:
    """Put the original objects back wherever our guard still stands. Calling it again changes nothing."""
    global _active, _replicate_kv_heads, _fixes, _plan_fix
    with _lock:
        _active = _replicate_kv_heads = _fixes = False
        if _plan_fix is not None:
            _plan_fix.undo()
            _plan_fix = None
        _replace({id(guarded): original for original, guarded in _guards.values()})
        for trainer, (original, guarded) in _trainers.items():
            if trainer.__dict__.get("__init__") is guarded:
                setattr(trainer, "__init__", original)  # noqa: B010
        _guards.clear()
        _trainers.clear()
        forget()


def installed() -> Installation:
    """The state of the guards; ``with installed():`` puts them in place for the block."""
    return Installation()


# What is in place. _guards maps id(original) to (original, guard): ids, since a callable need not hash.
_lock = threading.RLock()
_active = False
_replicate_kv_heads = False
_fixes = False
_plan_fix: PlanFix | None = None
_guards: dict[int, tuple[Function, Function]] = {}
_trainers: dict[type, tuple[Function, Function]] = {}
_watched: set[str] = set()


def is_guard(function: object) -> bool:
    """Whether this very object is one of the guards in place."""
    return any(function is guarded for _, guarded in _guards.values())


def _entry_points() -> Iterator[tuple[str, EntryPoint]]:
    for model, target in TARGETS.items() if unsupported_torchtitan() is None else ():
        for entry_point in target.entry_points():
            yield model, entry_point
    for entry_point in hf.entry_points():
        yield _NATIVE_TP, entry_point


def _states() -> Iterator[TargetState]:
    version = torchtitan_version()
    supported = unsupported_torchtitan() is None
    for model, target in TARGETS.items():
        found = False
        for entry_point in target.entry_points() if supported else ():
            found = True
            yield _state(model, entry_point)
        if not found:
            absent = f"torchtitan {version} has no such model" if version else "torchtitan is not installed"
            if not supported:
                absent = f"torchtitan {version or 'of unknown version'} is not supported"
            yield TargetState(model, target.name, False, absent)
    for entry_point in hf.entry_points():
        yield _state(_NATIVE_TP, entry_point)


def _state(model: str, entry_point: EntryPoint) -> TargetState:
    name = str(entry_point)
    problem = _problem(entry_point)
    if problem is not None:
        return TargetState(model, name, False, problem, faulty=True)
    if not _active:
        return TargetState(model, name, False, "not installed")
    if entry_point.module not in sys.modules:
        return TargetState(model, name, True, "guarded when its module is imported")
    if is_guard(_bound(entry_point)):
        fixes = ", and plans are completed" if _fixes and hf.is_entry_point(entry_point) else ""
        return TargetState(model, name, True, f"guarded{fixes}")
    return TargetState(model, name, False, "replaced by somebody else after install()", faulty=True)


def _bound(entry_point: EntryPoint) -> Any:
    """What the entry point's name stands for now, or None while its module is not loaded."""
    module = sys.modules.get(entry_point.module)
    return None if module is None else vars(module).get(entry_point.function)


def _problem(entry_point: EntryPoint) -> str | None:
    """Why an entry point cannot be guarded: by its source, or by what its loaded module holds instead."""
    if entry_point.problem is not None or entry_point.module not in sys.modules:
        return entry_point.problem
    function = _bound(entry_point)
    if function is None:
        return "its module is loaded, but does not hold it (yet)"
    return (hf.unbindable_function if hf.is_entry_point(entry_point) else unbindable_function)(function)


def _problems() -> list[str]:
    """What stands in the way of guarding everything, a sentence each."""
    native = hf.problems()
    unsupported = unsupported_torchtitan()
    if unsupported is not None:
        return [unsupported, *native]
    entry_points = [(model, point) for model, point in _entry_points() if not hf.is_entry_point(point)]
    if not entry_points and any(hf.entry_points()):
        return native
    if not entry_points:
        return ["torchtitan is not installed here, or has no entry point that is known: nothing is guarded."]
    problems = [
        f"{entry_point} is not guarded: {problem}."
        for _, entry_point in entry_points
        if (problem := _problem(entry_point)) is not None
    ]
    strange = torchtitan_identity().problem
    if strange is not None:
        found = len(entry_points) - len(problems)
        problems.append(f"torchtitan {strange}: {found} entry points were found in it and are guarded.")
    return problems + native


def _watch_imports() -> None:
    """Have every target that is not imported yet guarded as soon as it is."""
    # Deferred: the check itself must load without it, and fast.
    from wrapt import register_post_import_hook

    modules = {point.module for _, point in _entry_points() if point.problem is None}
    for name in modules.union(_TRAINER_MODULES, {hf.MODEL_MODULE}) - _watched:
        if name not in sys.modules:
            _watched.add(name)
            register_post_import_hook(_on_import, name)


def _on_import(module: ModuleType) -> None:
    with _lock:
        _watched.discard(module.__name__)
        if not _active:
            return
        _fix_plans()
        _guard_trainer()
        _guard_loaded(module.__name__)
        for _, entry_point in _entry_points():
            if entry_point.module == module.__name__ and (problem := _problem(entry_point)) is not None:
                # The import itself must not fail for it.
                warnings.warn(f"{entry_point} is not guarded: {problem}.", InstallWarning, stacklevel=2)


def _guard_loaded(only: str | None = None) -> None:
    """Guard the entry points whose modules are loaded, everywhere they are bound."""
    for _, entry_point in _entry_points():
        function = _bound(entry_point)
        if function is None or _problem(entry_point) is not None or only not in (None, entry_point.module):
            continue
        if is_guard(function) or id(function) in _guards:
            continue
        if hf.is_entry_point(entry_point):
            guarded = hf.guard(function, active=lambda: _active, fixes=lambda: _fixes)
        else:
            guarded = guard(function, active=lambda: _active, replicate_kv_heads=lambda: _replicate_kv_heads)
        _guards[id(function)] = (function, guarded)
    _replace({id(original): guarded for original, guarded in _guards.values()})


def _replace(replacements: Mapping[int, Function]) -> None:
    """Put ``replacements[id(x)]`` in place of x in every loaded module and every spec."""
    if not replacements:
        return
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        namespace = vars(module)
        for name, value in list(namespace.items()):
            if id(value) in replacements:
                namespace[name] = replacements[id(value)]
    for spec in _specs():
        replacement = replacements.get(id(getattr(spec, "parallelize_fn", None)))
        if replacement is not None:
            object.__setattr__(spec, "parallelize_fn", replacement)


def _specs() -> Iterator[Any]:
    """Every live dataclass instance with a ``parallelize_fn``: torchtitan's specs and users' own."""
    is_spec: dict[type, bool] = {}
    for candidate in gc.get_objects():
        kind = type(candidate)
        known = is_spec.get(kind)
        if known is None:
            fields = kind.__dict__.get("__dataclass_fields__", {})
            known = is_spec[kind] = "parallelize_fn" in fields
        if known:
            yield candidate


def _fix_plans() -> None:
    """Complete the plan of every transformers model made from now on, once there is such a class."""
    global _plan_fix
    base = getattr(sys.modules.get(hf.MODEL_MODULE), "PreTrainedModel", None)
    if _fixes and _plan_fix is None and base is not None:
        _plan_fix = ensure_lm_head_plan(base)


def _guard_trainer() -> None:
    """Check the job as the Trainer starts: before its device, process groups and first collective."""
    if unsupported_torchtitan() is not None:
        return
    for module_name in _TRAINER_MODULES:
        trainer = getattr(sys.modules.get(module_name), "Trainer", None)
        if not isinstance(trainer, type) or trainer.__module__ != module_name or trainer in _trainers:
            continue
        if "__init__" not in trainer.__dict__:
            continue
        original = trainer.__dict__["__init__"]
        guarded = _checked_init(original)
        _trainers[trainer] = (original, guarded)
        setattr(trainer, "__init__", guarded)  # noqa: B010 - mypy knows that __init__ is special


def _checked_init(original: Function) -> Function:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if _active:
            config = args[0] if args else kwargs.get("config", kwargs.get("job_config"))
            recorded_check(config)
        original(self, *args, **kwargs)

    return __init__


def recorded_check(config: Any) -> None:
    """`check_job`, whose refusal torchrun's own failure summary shows."""
    from torch.distributed.elastic.multiprocessing.errors import record

    check = functools.partial(check_job, is_guarded=is_guard, replicate_kv_heads=_replicate_kv_heads)
    record(check, recorder())(config)
