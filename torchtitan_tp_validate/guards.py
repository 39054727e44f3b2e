"""Put the guards in place in the installed torchtitan and transformers, and take them away again.

``install()`` replaces every known entry point by its guard: in the module that defines it, in every
module that imported it by name, and in every train or model spec built before. Modules imported later
are covered as they are imported. It also guards the Trainer's start, so that a job is refused before
its first process group. ``uninstall()`` puts the original objects back wherever the guard still stands,
and a guard that somebody else wrapped in the meantime goes quiet.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.errors import InstallError, InstallWarning, PlanError, RunWarning
from torchtitan_tp_validate.failure import recorder
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.job import Options, check_job, judge_job
from torchtitan_tp_validate.locate import torchtitan_version
from torchtitan_tp_validate.notices import forget
from torchtitan_tp_validate.releases import line_of, releases, what_is_gone
from torchtitan_tp_validate.shape import is_own
from torchtitan_tp_validate.supported import unsupported_torchtitan
from torchtitan_tp_validate.wrappers import TARGETS
from torchtitan_tp_validate.wrappers.guard import (
    Guardable,
    ParallelizeFunction,
    guardable_functions,
    parallelize_functions,
)

if TYPE_CHECKING:
    from torchtitan_tp_validate.releases.contract import Gone
    from torchtitan_tp_validate.transformers_tp.fix import PlanFix

Function = Callable[..., Any]

# Where transformers defines PreTrainedModel.
_MODEL_MODULE = "transformers.modeling_utils"


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
        return _guards.active

    @property
    def targets(self) -> tuple[TargetState, ...]:
        """The state of every entry point that this package knows, in the installed torchtitan."""
        with _guards.lock:
            return tuple(_guards.states())

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
        with _guards.lock:
            self._was_active.append(_guards.active)
            install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _guards.lock:
            if not self._was_active.pop():
                uninstall()


def install(
    *,
    strict: bool = False,
    replicate_kv_heads: bool = False,
    fix_tp_plan: bool = False,
    repair: bool = False,
    allow: Sequence[str] = (),
    check_replicas: int = 0,
) -> Installation:
    """Guard every known entry point of the installed torchtitan, and loading under transformers' native TP.

    Calling it again changes nothing, except that it can switch on what was off.

    Args:
        strict: raise instead of warning when something cannot be guarded; nothing is then installed.
        replicate_kv_heads: let several ranks share a key-value head where the TP degree is a multiple of
            n_kv_heads (see ``kv_replication``). It stays on until `uninstall`. A model of 0.3.x that no
            Trainer builds needs the converter ``ReplicateKVHeads``.
        fix_tp_plan: also complete the plans of transformers models that forget their output head, see
            `torchtitan_tp_validate.transformers_tp.ensure_lm_head_plan`.
        repair: mend the known faults of the installed torchtitan that a run would suffer from, instead of
            refusing it (see ``repairs``). It stays on until `uninstall`.
        check_replicas: compare the copies of replicated parameters after each so many steps, and stop a run
            whose copies differ (see ``repairs.replicas``); 0 for never. It stays on until `uninstall`.
        allow: codes of rules on a run as a whole (`rules.RUN_RULES`, `rules.FAULTS`) that warn, and do not
            refuse.

    Raises:
        UnknownNameError: there is no such rule.
        InstallError: under ``strict``, naming what cannot be guarded: torchtitan and transformers are both
            missing, one is of an unknown release, or an entry point is gone or has another signature.
    """
    options = Options(replicate_kv_heads=replicate_kv_heads, repair=repair, allow=tuple(allow))
    for problem in _guards.install(strict, options, fix_tp_plan):
        warnings.warn(problem, InstallWarning, stacklevel=2)
    if check_replicas:
        _guards.check_replicas(check_replicas)
    return Installation()


def uninstall() -> None:
    """Put the original objects back wherever our guard still stands. Calling it again changes nothing."""
    _guards.uninstall()


def installed() -> Installation:
    """Return the state of the guards; ``with installed():`` puts them in place for the block."""
    return Installation()


def validate_job(config: Any, world_size: int | None = None, **options: Any) -> None:
    """Refuse a job that cannot work, with everything that speaks against it; nothing need be installed.

    Args:
        config: a ``Trainer.Config`` (0.3.x) or ``JobConfig`` (0.2.x). It is left as it is, replication apart.
        world_size: the number of ranks; by default what torchrun says, and where nobody does, what depends
            on it is not judged.
        options: the other fields of `job.Options`: ``replicate_kv_heads``, ``repair``, ``allow`` and
            ``gpus_per_node``. A degree that crosses nodes is warned of.

    Raises:
        TPCompatError: the degree does not fit the model.
        RunError: something else keeps the run from working, see `layout`, or trains it wrong, see `faults`.
        TPDegreeError: a degree is not a positive whole number.
        KVReplicationError: replication is not supported with this job.
        PlanError: the model could not be judged.
    """
    given = Options(world_size=world_size, **options)
    verdict = judge_job(config, guarded=guardable_functions(), options=given)
    if verdict is None:
        raise PlanError("the job names no model that is known.")
    if verdict.error is not None:
        raise verdict.error.settled()
    for problem in verdict.warnings:
        warnings.warn(problem.warning, RunWarning, stacklevel=2)
    if verdict.unread:
        raise PlanError(verdict.unread)


def guards_in_place() -> list[Function]:
    """Return the guards that stand in the place of upstream's functions."""
    return _guards.in_place


def recorded_check(config: Any) -> None:
    """`check_job`, whose refusal torchrun's own failure summary shows."""
    from torch.distributed.elastic.multiprocessing.errors import record

    check = functools.partial(check_job, guarded=_guards.in_place, options=_guards.options)
    repairs = record(check, recorder())(config)
    if repairs:
        _guards.repair(repairs)
    _guards.guard_own(config)


def hand_over(config: Any) -> None:
    """Let the next Trainer start unjudged if it is for this very job, which `recorded_check` has accepted."""
    _guards.handed_over = config


class Guards:
    """The guards of this process: which are in place, and what they are asked to do.

    Attributes:
        lock: to be held by whoever reads or changes more than one thing.
        active: whether they are in place; each guard asks at each call, as it does for the next two.
        options: how jobs are judged.
        replicate_kv_heads: whether ranks may share key-value heads.
        fix_tp_plan: whether the plans of transformers models are completed.
        in_place: the guards that stand in the place of upstream's functions; it grows with their modules.
        own: entry points of somebody's own, beside torchtitan, which jobs have brought.
        handed_over: the job that the launcher has judged, until a Trainer starts.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active = False
        self.options = Options()
        self.replicate_kv_heads = False
        self.fix_tp_plan = False
        self._repairs: Any = None
        self.in_place: list[Function] = []
        self.own: list[ParallelizeFunction] = []
        self.handed_over: Any = None
        self._plan_fix: PlanFix | None = None
        # id(original) -> (original, guard): ids, since a callable need not hash.
        self._functions: dict[int, tuple[Function, Function]] = {}
        self._trainers: dict[type, tuple[Function, Function]] = {}
        self._watched: set[str] = set()

    def repair(self, codes: Sequence[str]) -> None:
        """Mend known faults of the installed torchtitan, until `uninstall`.

        Raises:
            RepairError: the code at fault is not the one that the repair is for.
        """
        self._repairs = importlib.import_module("torchtitan_tp_validate.repairs")
        self._repairs.apply(codes)

    def check_replicas(self, steps: int) -> None:
        """Compare the copies of parameters after each so many steps, until `uninstall`."""
        self._repairs = importlib.import_module("torchtitan_tp_validate.repairs")
        importlib.import_module("torchtitan_tp_validate.repairs.replicas").check_every(steps)

    def install(self, strict: bool, options: Options, fix_tp_plan: bool) -> list[str]:
        """Put them in place; return what is to be told of it, a sentence each: nothing when they were.

        Raises:
            InstallError: under ``strict``, when there is something to tell.
        """
        with self.lock:
            problems = _problems()
            if strict and problems:
                raise InstallError("Cannot guard everything:\n  " + "\n  ".join(problems))
            was_active, self.active = self.active, True
            self.replicate_kv_heads |= options.replicate_kv_heads
            self.options = replace(
                options,
                replicate_kv_heads=self.replicate_kv_heads,
                repair=options.repair or self.options.repair,
                allow=(*self.options.allow, *options.allow),
            )
            self.fix_tp_plan |= fix_tp_plan
            self._watch_imports()
            self._fix_plans()
            self._guard_trainer()
            self._guard_loaded()
        return [] if was_active else problems

    def uninstall(self) -> None:
        """Put the original objects back wherever a guard still stands."""
        with self.lock:
            self.active = self.replicate_kv_heads = self.fix_tp_plan = False
            self.options = Options()
            if self._repairs is not None:
                self._repairs.undo()
                self._repairs = None
            self.handed_over = None
            if self._plan_fix is not None:
                self._plan_fix.undo()
                self._plan_fix = None
            _replace({id(guarded): original for original, guarded in self._functions.values()})
            for trainer, (original, guarded) in self._trainers.items():
                if trainer.__dict__.get("__init__") is guarded:
                    setattr(trainer, "__init__", original)  # noqa: B010
            self._functions.clear()
            self.in_place.clear()
            self.own.clear()
            self._trainers.clear()
            forget()

    def states(self) -> Iterator[TargetState]:
        """Yield the state of every entry point, and of every model that this torchtitan does not have."""
        version, supported = torchtitan_version(), unsupported_torchtitan() is None
        name = torchtitan_identity().name if version else ""
        found = [*parallelize_functions(), *self.own] if supported else []
        for model, target in TARGETS.items():
            entry_points = [point for point in found if point.model == model]
            yield from map(self._state, entry_points)
            if not entry_points:
                absent = f"torchtitan {name} has no such model" if version else "torchtitan is not installed"
                if not supported:
                    absent = f"torchtitan {version or 'of unknown version'} is not supported"
                yield TargetState(model, target.name, False, absent)
        yield from map(self._state, (point for point in found if point.model not in TARGETS))
        yield from map(self._state, _native_tp())

    def _state(self, entry_point: Guardable) -> TargetState:
        model, name = entry_point.model, str(entry_point)
        problem = entry_point.obstacle
        if problem is not None:
            return TargetState(model, name, False, problem, faulty=True)
        if not self.active:
            return TargetState(model, name, False, "not installed")
        if entry_point.module not in sys.modules:
            when = "guarded when its module is imported"
            return TargetState(model, name, True, f"{when}{entry_point.beside_the_check(self)}")
        if entry_point.bound in self.in_place:
            return TargetState(model, name, True, f"guarded{entry_point.beside_the_check(self)}")
        return TargetState(model, name, False, "replaced by somebody else after install()", faulty=True)

    def _watch_imports(self) -> None:
        """Have every target that is not imported yet guarded as soon as it is."""
        # Deferred: the check itself must load without it, and fast.
        from wrapt import register_post_import_hook

        modules = {point.module for point in _entry_points() if point.problem is None}
        for name in modules.union(_trainer_modules(), {_MODEL_MODULE}) - self._watched:
            if name not in sys.modules:
                self._watched.add(name)
                register_post_import_hook(self._on_import, name)

    def _on_import(self, module: ModuleType) -> None:
        with self.lock:
            self._watched.discard(module.__name__)
            if not self.active:
                return
            self._fix_plans()
            self._guard_trainer()
            self._guard_loaded(module.__name__)
            for point in _entry_points():
                if point.module != module.__name__ or point.bound in self.in_place:
                    continue
                if (problem := point.obstacle) is not None:
                    # The import itself must not fail for it.
                    warnings.warn(f"{point} is not guarded: {problem}.", InstallWarning, stacklevel=2)

    def _guard_loaded(self, only: str | None = None) -> None:
        """Guard the entry points whose modules are loaded, everywhere they are bound."""
        for point in _entry_points():
            function = point.bound
            if function is None or function in self.in_place or only not in (None, point.module):
                continue
            if point.obstacle is None and id(function) not in self._functions:
                guarded = point.guard(function, self)
                self._functions[id(function)] = (function, guarded)
                self.in_place.append(guarded)
        _replace({id(original): guarded for original, guarded in self._functions.values()})

    def guard_own(self, job: Any) -> None:
        """Guard the function that parallelizes a job's model, where it is somebody's own."""
        model = line_of(job).requested_model(job)
        if not self.active or model is None or not is_own(model.parallelize_fn):
            return
        function = model.parallelize_fn
        point = ParallelizeFunction.of(function)
        with self.lock:
            if point.bound is function and function not in self.in_place:
                self.own.append(point)
                self._guard_loaded(point.module)

    def _fix_plans(self) -> None:
        """Complete the plan of every transformers model made from now on, once there is such a class."""
        base = getattr(sys.modules.get(_MODEL_MODULE), "PreTrainedModel", None)
        if self.fix_tp_plan and self._plan_fix is None and base is not None:
            from torchtitan_tp_validate.transformers_tp.fix import ensure_lm_head_plan

            self._plan_fix = ensure_lm_head_plan(base)

    def _guard_trainer(self) -> None:
        """Check the job as the Trainer starts: before its device, process groups and first collective."""
        if unsupported_torchtitan() is not None:
            return
        for module_name in _trainer_modules():
            trainer = getattr(sys.modules.get(module_name), "Trainer", None)
            if not isinstance(trainer, type) or trainer.__module__ != module_name:
                continue
            if trainer in self._trainers or "__init__" not in trainer.__dict__:
                continue
            original = trainer.__dict__["__init__"]
            guarded = self._checked_init(original)
            self._trainers[trainer] = (original, guarded)
            setattr(trainer, "__init__", guarded)  # noqa: B010 - mypy knows that __init__ is special

    def _checked_init(self, original: Function) -> Function:
        @functools.wraps(original)
        def __init__(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if self.active:
                config = args[0] if args else kwargs.get("config", kwargs.get("job_config"))
                # Once only: whoever starts another Trainer with it may have changed it.
                judged, self.handed_over = self.handed_over, None
                if not _is_same_job(config, judged):
                    recorded_check(config)
            original(trainer, *args, **kwargs)

        return __init__


_guards = Guards()


def _is_same_job(config: Any, judged: Any) -> bool:
    """Whether a job is the one that was judged, or torchtitan's shallow copy of it (``Config.build``)."""
    if judged is None or type(config) is not type(judged):
        return False
    return all(getattr(config, field.name) is getattr(judged, field.name) for field in fields(judged))


def _trainer_modules() -> list[str]:
    return list(dict.fromkeys(release.TRAINER_MODULE for release in releases()))


def _entry_points() -> Iterator[Guardable]:
    if unsupported_torchtitan() is None:
        yield from parallelize_functions()
    yield from _guards.own
    yield from _native_tp()


def _native_tp() -> Iterator[Guardable]:
    """Return the entry point of transformers' native tensor parallelism, if transformers is installed."""
    from torchtitan_tp_validate.transformers_tp.guard import distributing_functions

    return distributing_functions()


def _problems() -> list[str]:
    """Return what stands in the way of guarding everything, a sentence each."""
    from torchtitan_tp_validate.transformers_tp.guard import problems as problems_of_native_tp

    native = problems_of_native_tp()
    unsupported = unsupported_torchtitan()
    if unsupported is not None:
        return [unsupported, *native]
    entry_points = list(parallelize_functions())
    if not entry_points and any(_native_tp()):
        return native
    if not entry_points:
        return ["torchtitan is not installed here, or has no entry point that is known: nothing is guarded."]
    problems = [
        f"{point} is not guarded: {problem}."
        for point in entry_points
        if (problem := point.obstacle) is not None
    ]
    strange = torchtitan_identity().problem
    if strange is not None:
        found = len(entry_points) - len(problems)
        problems.append(f"torchtitan {strange}: {found} entry points were found in it and are guarded.")
        problems += _told(what_is_gone())
    return problems + native


def _told(gone: Sequence[Gone]) -> Iterator[str]:
    """Say what is read of torchtitan and is not there; of a tree that is like none, the first of it."""
    yield from (f"torchtitan {part}" for part in gone[:_MOST_TOLD])
    if len(gone) > _MOST_TOLD:
        more = len(gone) - _MOST_TOLD
        yield f"torchtitan lacks {more} more names that are read: tp-validate doctor lists them."


_MOST_TOLD = 5


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
