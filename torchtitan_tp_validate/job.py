"""From the job that torchtitan parsed from its own command line to the model and degree it asks for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchtitan_tp_validate.degrees import PIPELINE_FLAG, Axis, Degrees, applies_fsdp, degrees_of_job
from torchtitan_tp_validate.errors import PlanError, Problem, RunError, RunWarning, UnknownNameError
from torchtitan_tp_validate.faults import find_faults, not_judged
from torchtitan_tp_validate.layout import find_problems, known_shards
from torchtitan_tp_validate.notices import warn_once
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.releases import kv_replication_of, line_of, read_plan
from torchtitan_tp_validate.releases.base import RequestedModel
from torchtitan_tp_validate.releases.kv_replication import unsupported_error
from torchtitan_tp_validate.releases.runs import has_real_ranks
from torchtitan_tp_validate.rules import FAULTS, RUN_RULES
from torchtitan_tp_validate.shape import is_own
from torchtitan_tp_validate.validate import raise_if_unread, run_error


@dataclass(frozen=True)
class Job:
    """What a torchtitan job is about to parallelize.

    Attributes:
        model: the model that it is about.
        degrees: what it asks for.
        subject: what to judge: the model's config, with the run where it decides what the config declares.
        pp: the pipeline parallel degree.
    """

    model: RequestedModel
    degrees: Degrees
    subject: Any
    pp: int = 1


def parse_command_line(arguments: Sequence[str] | None = None) -> Any:
    """Return the job that torchtitan makes of these arguments, or of this process's."""
    from torchtitan.config import ConfigManager

    # Explicit, since 0.2.x binds its default when it is imported.
    return ConfigManager().parse_args(list(sys.argv[1:] if arguments is None else arguments))


def read_job(config: Any, world_size: int | None = None) -> Job | None:
    """Read a ``Trainer.Config`` (0.3.x) or ``JobConfig`` (0.2.x), or None when it names no known model.

    A job without a model is torchtitan's to complain about, and it does so first thing.

    Args:
        config: the job.
        world_size: the number of ranks, which tells how many shards are left to it, or None.
    """
    degrees = degrees_of_job(config)
    line = line_of(config)
    model = line.requested_model(config)
    if model is None:
        return None
    pp = getattr(config.parallelism, PIPELINE_FLAG, 1)
    degrees = replace(
        known_shards(degrees, pp, world_size),
        fsdp=applies_fsdp(model.parallelize_fn),
        by_own_function=is_own(model.parallelize_fn),
    )
    return Job(model, degrees, line.in_run(model.config, config), pp)


@dataclass(frozen=True)
class Options:
    """How a job is to be judged.

    Attributes:
        replicate_kv_heads: with KV-head replication; in 0.3.x it is put into the job's model config.
        repair: with the repairs of known faults (see `repairs`).
        allow: codes of rules on the run as a whole that are to be told, and not to refuse it.
        world_size: the number of ranks; where it is None, what torchrun says.
        gpus_per_node: how many of them share a node, or None.
    """

    replicate_kv_heads: bool = False
    repair: bool = False
    allow: tuple[str, ...] = ()
    world_size: int | None = None
    gpus_per_node: int | None = None

    def __post_init__(self) -> None:
        unknown = [code for code in self.allow if code not in RUN_RULES and code not in FAULTS]
        if unknown:
            raise UnknownNameError(
                "rule on a run", unknown[0], [*RUN_RULES, *FAULTS], "torchtitan-tp-validate"
            )


@dataclass(frozen=True)
class Verdict:
    """What there is to say of a job before it starts.

    Attributes:
        degrees: what it asks for.
        plan: what its model splits; None where that is nothing, or could not be read.
        error: everything that keeps it from working, or None.
        warnings: what is only told.
        unread: why its model was not judged, or empty.
        reason: the same, as the reader of the model says it, or empty.
        repairs: the codes of the faults that it would suffer from without their repair.
        not_judged: the rules on the run that were left out, and why.
    """

    degrees: Degrees
    plan: Plan | None
    error: RunError | None
    warnings: tuple[Problem, ...]
    unread: str = ""
    reason: str = ""
    repairs: tuple[str, ...] = ()
    not_judged: tuple[str, ...] = ()


def judge_job(
    config: Any, *, guarded: Collection[Callable[..., Any]], options: Options = Options()
) -> Verdict | None:
    """Return the verdict on a job, or None where it names no model that is known.

    What its model splits is judged only where its parallelize function is guarded: what other functions shard
    is theirs to know. The run as a whole is judged in any case.

    Args:
        config: the job. Replication apart, it is left as it is.
        guarded: the parallelize functions that are guarded.
        options: how to judge it.

    Raises:
        TPDegreeError: the degree is not a positive whole number.
        KVReplicationError: replication is not supported with this job.
    """
    world_size = started_ranks(config) if options.world_size is None else options.world_size
    line = line_of(config)
    replication = kv_replication_of(line) if options.replicate_kv_heads else None
    if replication is not None:
        replication.put_into_job(config)
    job = read_job(config, world_size)
    if job is None:
        return None
    degrees = replace(job.degrees, replicate_kv_heads=options.replicate_kv_heads)
    plan, unread, reason = None, "", ""
    shards: tuple[Problem, ...] = ()
    if degrees.splits_nothing:
        if unguarded(job.model, config, guarded=guarded) is None:
            shards = _uneven_shards(job)
    else:
        unread = unguarded(job.model, config, guarded=guarded) or ""
        if unread and replication is not None:
            raise unsupported_error(unread.removesuffix("."), "a guarded model")
        if not unread:
            try:
                plan = read_plan(job.subject, degrees)
                raise_if_unread(plan.at(degrees))
            except PlanError as problem:
                unread, reason = f"{job.model.name}: {problem.reason}", problem.reason
    broken = {dim.code for dim in plan.violations(degrees)} if plan is not None else set()
    run = line.read_run(config, job.model, job.degrees, broken)
    run = replace(run, world_size=world_size, gpus_per_node=options.gpus_per_node)
    faults = find_faults(run)
    repairs = tuple(fault.code for fault in faults if options.repair and FAULTS[fault.code].can_be_repaired)
    problems = tuple(
        replace(problem, warns=True) if problem.code in options.allow else problem
        for problem in (*shards, *find_problems(run), *faults)
        if problem.code not in repairs
    )
    error = run_error(plan, degrees, problems)
    if error is None and not unread:
        if replication is not None:
            replication.accept(job.model, config)
        objection = "" if degrees.splits_nothing else run.objection
        unread = f"{job.model.name}: {objection}" if objection else ""
    warnings = tuple(problem for problem in problems if problem.warns)
    left_out = () if run.checkpoint is None else run.checkpoint.left_out(run.degrees)
    left_out = (*not_judged(run), *left_out)
    return Verdict(degrees, plan, error, warnings, unread, reason, repairs, left_out)


def _uneven_shards(job: Job) -> tuple[Problem, ...]:
    """Return what FSDP alone cannot cut evenly of a run that splits nothing over TP or EP ranks."""
    try:
        broken = read_plan(job.subject, job.degrees).violations(job.degrees)
    except PlanError:  # there is nothing that it would have to fit
        return ()
    return tuple(
        Problem(
            dim.code,
            f"{dim.name} ({dim.size}) {dim.problem(job.degrees.of(dim.axis))}",
            dim.rule.why,
            dim.otherwise.text,
            dim.rule.instead,
        )
        for dim in broken
        if dim.axis is Axis.FSDP
    )


def check_job(
    config: Any, *, guarded: Collection[Callable[..., Any]], options: Options = Options()
) -> tuple[str, ...]:
    """Refuse a job that cannot work, before a device or process group exists.

    A config that cannot be judged now, since it is completed later (the transformers backend reads its
    head counts when the model is built) or by a way that is not known, is let through with a warning; the
    guard of the parallelize function then has the last word.

    Args:
        config: the job. Replication apart, it is left as it is.
        guarded: the parallelize functions that are guarded.
        options: how to judge it.

    Returns:
        The codes of the faults that it was accepted to be repaired of.

    Raises:
        TPCompatError: the degree does not fit.
        RunError: something else keeps the run from working, see `layout`, or trains it wrong, see `faults`.
        TPDegreeError: the degree is not a positive whole number.
        KVReplicationError: replication is not supported with this job.
    """
    verdict = judge_job(config, guarded=guarded, options=options)
    if verdict is None:
        return ()
    if verdict.error is not None:
        raise verdict.error.settled()
    for problem in verdict.warnings:
        warn_once(problem.warning, problem.code, audible=_is_first_rank(), category=RunWarning)
    if verdict.unread:
        again = " It is tried again when the model is built." if verdict.reason else ""
        _not_validated(f"{verdict.unread}{again}", verdict.reason)
    for left_out in verdict.not_judged:
        _not_validated(f"{left_out}.")
    return verdict.repairs


def started_ranks(config: Any) -> int | None:
    """Return how many ranks torchrun has started for a job, or None where nobody says so."""
    said = os.environ.get("WORLD_SIZE", "")
    return int(said) if said.isdecimal() and has_real_ranks(config) else None


def unguarded(
    model: RequestedModel, run: Any = None, *, guarded: Collection[Callable[..., Any]]
) -> str | None:
    """Return why nobody here knows what a model's parallelize function shards, or None when it is guarded.

    A function that hands on to a guarded one by name (as graph_trainer's do) is as good as guarded, unless
    the job asks it for the other way that it knows: a solver, which shards as it sees fit. So is one of
    somebody's own, where its shape and source tell what it splits.

    Args:
        model: what is parallelized.
        run: the job, if there is one.
        guarded: the functions that are.
    """
    name = f"{model.parallelize_fn.__module__}.{model.parallelize_fn.__qualname__}"
    if model.parallelize_fn in guarded:
        return None
    if any(called is function for called in _called_by(model.parallelize_fn) for function in guarded):
        if not getattr(getattr(run, "compile", None), "enable_autoparallel", False):
            return None
        name += " with compile.enable_autoparallel"
    elif is_own(model.parallelize_fn):
        return None
    return f"{model.name} is parallelized by {name}, which is not guarded."


def _called_by(function: Callable[..., Any]) -> list[Any]:
    """Return the module's own objects that a function's code mentions by name."""
    code, namespace = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    return [namespace[name] for name in code.co_names if name in namespace] if code else []


def _not_validated(text: str, reason: str = "") -> None:
    """Say so at startup, where every rank would: the first one speaks for all."""
    warn_once(f"Not validated at startup: {text}", reason or text, audible=_is_first_rank())


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
