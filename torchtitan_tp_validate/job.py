"""From the job that torchtitan parsed from its own command line to the model and degree it asks for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchtitan_tp_validate.degrees import Degrees, degrees_of_job
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.locate import applies_fsdp
from torchtitan_tp_validate.notices import warn_once
from torchtitan_tp_validate.releases.torchtitan_0_3 import find_torchtitan_refusal, in_run
from torchtitan_tp_validate.validate import judge


@dataclass(frozen=True)
class Job:
    """What a torchtitan job is about to parallelize.

    Attributes:
        name: model and flavor as torchtitan calls them.
        model_config: the model's config (0.3.x) or model args (0.2.x).
        degrees: what it asks for.
        parallelize_fn: the function that the model's spec names.
        run: the ``Trainer.Config`` (0.3.x) or ``JobConfig`` (0.2.x) that it is part of, if there is one.
    """

    name: str
    model_config: Any
    degrees: Degrees
    parallelize_fn: Callable[..., Any]
    run: Any = None

    @property
    def subject(self) -> Any:
        """What to judge: the model's config, with the run where it decides what the config declares."""
        return in_run(self.model_config, self.run)

    @property
    def splits_nothing(self) -> bool:
        """Whether it asks for neither tensor nor expert parallelism."""
        return self.degrees.tp == self.degrees.ep == 1


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
    if hasattr(config, "model_spec"):
        spec = config.model_spec
        if spec is None:
            return None
        return _job(f"{spec.name} {spec.flavor}", spec.model, degrees, spec.parallelize_fn, config)
    if config.experimental.custom_import:
        # The Trainer imports it first too: it may register the model.
        importlib.import_module(config.experimental.custom_import)
    train_spec = importlib.import_module("torchtitan.protocols.train_spec")
    try:
        spec = train_spec.get_train_spec(config.model.name)
    except ValueError:
        return None
    args = spec.model_args.get(config.model.flavor)
    if args is None:
        return None
    return _job(f"{config.model.name} {config.model.flavor}", args, degrees, spec.parallelize_fn, config)


def _job(name: str, model_config: Any, degrees: Degrees, parallelize_fn: Callable[..., Any], run: Any) -> Job:
    degrees = replace(degrees, fsdp=applies_fsdp(parallelize_fn))
    return Job(name, model_config, degrees, parallelize_fn, run)


def check_job(
    config: Any, *, is_guarded: Callable[[Callable[..., Any]], bool], replicate_kv_heads: bool = False
) -> None:
    """Refuse a job whose degree does not fit its model, before a device or process group exists.

    Only a model whose parallelize function is guarded is judged: what other functions shard is theirs to
    know. A config that cannot be judged now, since it is completed later (the transformers backend reads its
    head counts when the model is built) or by a way that is not known, is let through with a warning; the
    guard of the parallelize function then has the last word.

    Args:
        config: the job. Replication apart, it is left as it is.
        is_guarded: whether a parallelize function is.
        replicate_kv_heads: ask for KV-head replication; in 0.3.x this converts the job's model config.

    Raises:
        TPCompatError: the degree does not fit.
        TPDegreeError: the degree is not a positive whole number.
        KVReplicationError: replication is not supported with this job.
    """
    if replicate_kv_heads:
        from torchtitan_tp_validate.kv_replication.job import ask_job

        ask_job(config)
    job = read_job(config)
    if job is None or job.splits_nothing:
        return
    problem = unguarded(job, is_guarded=is_guarded)
    if problem is not None:
        if replicate_kv_heads:
            from torchtitan_tp_validate.kv_replication.support import unsupported_error

            raise unsupported_error(problem.removesuffix("."), "a guarded model")
        _not_validated(problem)
        return
    try:
        judge(job.subject, replace(job.degrees, replicate_kv_heads=replicate_kv_heads))
    except PlanError as error:
        again = "It is tried again when the model is built."
        _not_validated(f"{job.name}: {error.reason} {again}", error.reason)
        return
    if replicate_kv_heads:
        from torchtitan_tp_validate.kv_replication.job import accept_job

        raise_if_replication_is_unsupported(job)
        accept_job(config)
    refusal = find_torchtitan_refusal(job.subject, job.degrees)
    if refusal is not None:
        _not_validated(f"{job.name}: {refusal}")


def raise_if_replication_is_unsupported(job: Job) -> None:
    """Refuse replication in a job that fits its degrees, where something else of it does not go with it.

    Raises:
        KVReplicationError: another function than torchtitan's own parallelizes the model, or Hugging Face
            weights are loaded or saved that would be permuted.
    """
    from torchtitan_tp_validate.kv_replication.support import raise_if_foreign, raise_if_weights_are_permuted

    raise_if_foreign(job.parallelize_fn)
    raise_if_weights_are_permuted(job.model_config, job.degrees.tp, job.run)


def unguarded(job: Job, *, is_guarded: Callable[[Callable[..., Any]], bool]) -> str | None:
    """Why nobody here knows what the job's parallelize function shards, or None when it is guarded.

    A function that hands on to a guarded one by name (as graph_trainer's do) is as good as guarded, unless
    the job asks it for the other way that it knows: a solver, which shards as it sees fit.
    """
    function = f"{job.parallelize_fn.__module__}.{job.parallelize_fn.__qualname__}"
    if is_guarded(job.parallelize_fn):
        return None
    if any(is_guarded(candidate) for candidate in _called_by(job.parallelize_fn)):
        if not getattr(getattr(job.run, "compile", None), "enable_autoparallel", False):
            return None
        function += " with compile.enable_autoparallel"
    return f"{job.name} is parallelized by {function}, which is not guarded."


def _called_by(function: Callable[..., Any]) -> list[Any]:
    """The module's own objects that a function's code mentions by name."""
    code, namespace = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    return [namespace[name] for name in code.co_names if name in namespace] if code else []


def _not_validated(text: str, reason: str = "") -> None:
    """Say so at startup, where every rank would: the first one speaks for all."""
    first = os.environ.get("RANK", "0") == "0"
    warn_once(f"Not validated at startup: {text}", reason or text, audible=first)
