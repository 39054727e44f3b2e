"""From the job that torchtitan parsed from its own command line to the model and degree it asks for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchtitan_tp_validate.degrees import Degrees, applies_fsdp, degrees_of_job
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.notices import warn_once
from torchtitan_tp_validate.releases import kv_replication_of, line_of
from torchtitan_tp_validate.releases.base import RequestedModel
from torchtitan_tp_validate.releases.kv_replication import unsupported_error
from torchtitan_tp_validate.validate import judge


@dataclass(frozen=True)
class Job:
    """What a torchtitan job is about to parallelize.

    Attributes:
        model: the model that it is about.
        degrees: what it asks for.
        subject: what to judge: the model's config, with the run where it decides what the config declares.
    """

    model: RequestedModel
    degrees: Degrees
    subject: Any


def parse_command_line(arguments: Sequence[str] | None = None) -> Any:
    """Return the job that torchtitan makes of these arguments, or of this process's."""
    from torchtitan.config import ConfigManager

    # Explicit, since 0.2.x binds its default when it is imported.
    return ConfigManager().parse_args(list(sys.argv[1:] if arguments is None else arguments))


def read_job(config: Any) -> Job | None:
    """Read a ``Trainer.Config`` (0.3.x) or ``JobConfig`` (0.2.x), or None when it names no known model.

    A job without a model is torchtitan's to complain about, and it does so first thing.
    """
    degrees = degrees_of_job(config)
    line = line_of(config)
    model = line.requested_model(config)
    if model is None:
        return None
    degrees = replace(degrees, fsdp=applies_fsdp(model.parallelize_fn))
    return Job(model, degrees, line.in_run(model.config, config))


def check_job(
    config: Any, *, guarded: Collection[Callable[..., Any]], replicate_kv_heads: bool = False
) -> None:
    """Refuse a job whose degree does not fit its model, before a device or process group exists.

    Only a model whose parallelize function is guarded is judged: what other functions shard is theirs to
    know. A config that cannot be judged now, since it is completed later (the transformers backend reads its
    head counts when the model is built) or by a way that is not known, is let through with a warning; the
    guard of the parallelize function then has the last word.

    Args:
        config: the job. Replication apart, it is left as it is.
        guarded: the parallelize functions that are guarded.
        replicate_kv_heads: ask for KV-head replication; in 0.3.x this converts the job's model config.

    Raises:
        TPCompatError: the degree does not fit.
        TPDegreeError: the degree is not a positive whole number.
        KVReplicationError: replication is not supported with this job.
    """
    line = line_of(config)
    replication = kv_replication_of(line) if replicate_kv_heads else None
    if replication is not None:
        replication.put_into_job(config)
    job = read_job(config)
    if job is None or job.degrees.splits_nothing:
        return
    problem = unguarded(job.model, config, guarded=guarded)
    if problem is not None:
        if replication is not None:
            raise unsupported_error(problem.removesuffix("."), "a guarded model")
        _not_validated(problem)
        return
    try:
        judge(job.subject, replace(job.degrees, replicate_kv_heads=replicate_kv_heads))
    except PlanError as error:
        again = "It is tried again when the model is built."
        _not_validated(f"{job.model.name}: {error.reason} {again}", error.reason)
        return
    if replication is not None:
        replication.accept(job.model, config)
    refusal = line.find_torchtitan_refusal(job.subject, job.degrees)
    if refusal is not None:
        _not_validated(f"{job.model.name}: {refusal}")


def unguarded(
    model: RequestedModel, run: Any = None, *, guarded: Collection[Callable[..., Any]]
) -> str | None:
    """Return why nobody here knows what a model's parallelize function shards, or None when it is guarded.

    A function that hands on to a guarded one by name (as graph_trainer's do) is as good as guarded, unless
    the job asks it for the other way that it knows: a solver, which shards as it sees fit.

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
    return f"{model.name} is parallelized by {name}, which is not guarded."


def _called_by(function: Callable[..., Any]) -> list[Any]:
    """Return the module's own objects that a function's code mentions by name."""
    code, namespace = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    return [namespace[name] for name in code.co_names if name in namespace] if code else []


def _not_validated(text: str, reason: str = "") -> None:
    """Say so at startup, where every rank would: the first one speaks for all."""
    first = os.environ.get("RANK", "0") == "0"
    warn_once(f"Not validated at startup: {text}", reason or text, audible=first)
