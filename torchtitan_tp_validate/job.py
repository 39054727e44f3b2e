"""From the job that torchtitan parsed from its own command line to the model and degree it asks for."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torchtitan_tp_validate.errors import NotValidatedWarning, PlanError
from torchtitan_tp_validate.kv_replication.job import ask_job
from torchtitan_tp_validate.kv_replication.support import refuse, refuse_permuted_weights
from torchtitan_tp_validate.rules import FLAGS, Axis, Degrees
from torchtitan_tp_validate.validate import judge, read_degrees
from torchtitan_tp_validate.wrappers.target import applies_fsdp

_WHAT_IS_LEFT = -1


@dataclass(frozen=True)
class Job:
    """What a torchtitan job is about to parallelize.

    Attributes:
        name: model and flavor as torchtitan calls them.
        model_config: the model's config (0.3.x) or model args (0.2.x).
        degrees: what it asks for.
        parallelize_fn: the function that the model's spec names.
    """

    name: str
    model_config: Any
    degrees: Degrees
    parallelize_fn: Callable[..., Any]

    @property
    def splits_nothing(self) -> bool:
        """Whether it asks for neither tensor nor expert parallelism."""
        return self.degrees.tp == self.degrees.ep == 1


def read_job(config: Any) -> Job | None:
    """Read a ``Trainer.Config`` (0.3.x) or ``JobConfig`` (0.2.x), or None when it names no known model.

    A job without a model is torchtitan's to complain about, and it does so first thing.
    """
    degrees = degrees_of(config)
    if hasattr(config, "model_spec"):
        spec = config.model_spec
        if spec is None:
            return None
        return _job(f"{spec.name} {spec.flavor}", spec.model, degrees, spec.parallelize_fn)
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
    return _job(f"{config.model.name} {config.model.flavor}", args, degrees, spec.parallelize_fn)


def _job(name: str, model_config: Any, degrees: Degrees, parallelize_fn: Callable[..., Any]) -> Job:
    return Job(name, model_config, replace(degrees, fsdp=applies_fsdp(parallelize_fn)), parallelize_fn)


def degrees_of(config: Any) -> Degrees:
    """What a parsed job asks for, its data parallel degree only if that is not left to the number of ranks.

    Raises:
        TPDegreeError: a degree is not a positive whole number.
    """
    parallelism = config.parallelism
    asked = {
        ours: getattr(parallelism, theirs) for ours, theirs in FLAGS.items() if hasattr(parallelism, theirs)
    }
    dp_shard_is_known = True
    if asked.get(Axis.FSDP.value) == _WHAT_IS_LEFT:
        # The number of ranks tells; the guard of the parallelize function hears it.
        del asked[Axis.FSDP.value]
        dp_shard_is_known = False
    if hasattr(parallelism, "spmd_backend"):
        asked["spmd_backend"] = parallelism.spmd_backend
    return replace(
        read_degrees(SimpleNamespace(**asked)),
        dp_shard_is_known=dp_shard_is_known,
        seq_len=getattr(getattr(config, "training", None), "seq_len", None),
        sequence_parallel=getattr(parallelism, "enable_sequence_parallel", True),
    )


def check_job(
    config: Any, *, is_guarded: Callable[[Callable[..., Any]], bool], replicate_kv_heads: bool = False
) -> None:
    """Refuse a job whose degree does not fit its model, before a device or process group exists.

    Only a model whose parallelize function is guarded is judged: what other functions shard is theirs to
    know. Nor is a config judged that is completed later (the transformers backend reads its head counts
    when the model is built); the guard of the parallelize function then has the last word, and says so
    if it cannot read the model either.

    Args:
        config: the job.
        is_guarded: whether a parallelize function is.
        replicate_kv_heads: ask for KV-head replication; in 0.3.x this converts the job's model config.

    Raises:
        TPCompatError: the degree does not fit.
        TPDegreeError: the degree is not a positive whole number.
        KVReplicationError: replication is not supported with this job.
    """
    if replicate_kv_heads:
        ask_job(config)
    job = read_job(config)
    if job is None or job.splits_nothing:
        return
    problem = unguarded(job, is_guarded=is_guarded)
    if problem is not None:
        if replicate_kv_heads:
            raise refuse(problem.removesuffix("."), "a guarded model")
        warnings.warn(f"Not validated at startup: {problem}", NotValidatedWarning, stacklevel=2)
        return
    try:
        judge(job.model_config, replace(job.degrees, replicate_kv_heads=replicate_kv_heads))
    except PlanError:
        return
    if replicate_kv_heads:
        refuse_permuted_weights(job.model_config, job.degrees.tp, config)


def unguarded(job: Job, *, is_guarded: Callable[[Callable[..., Any]], bool]) -> str | None:
    """Why nobody here knows what the job's parallelize function shards, or None when it is guarded."""
    if is_guarded(job.parallelize_fn):
        return None
    function = f"{job.parallelize_fn.__module__}.{job.parallelize_fn.__qualname__}"
    return f"{job.name} is parallelized by {function}, which is not guarded."
