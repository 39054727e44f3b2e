"""All that differs between upstream releases, and the way from a real object to its `Plan`.

A release is added here by its name. What the files know is in `base`; each is loaded when it is needed, and
none of them loads torch or torchtitan by that.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.locate import package_folder
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.releases.base import KVReplication, Reader, Release
from torchtitan_tp_validate.releases.contract import Gone, gone_from, missing_names
from torchtitan_tp_validate.releases.reading import shortened

_NO_DEGREES = Degrees(tp=1)


def readers() -> tuple[Reader, ...]:
    """Return what describes models, in the order of recognition."""
    from torchtitan_tp_validate.releases import (
        huggingface,
        torchtitan_0_2,
        torchtitan_0_3,
        torchtitan_fork,
        torchtitan_transformers,
    )

    # Some Hugging Face configs have torchtitan's names: they are recognized first.
    return torchtitan_transformers, huggingface, torchtitan_0_3, torchtitan_fork, torchtitan_0_2


def releases() -> tuple[Release, ...]:
    """Return the lines of torchtitan, in the order of recognition."""
    from torchtitan_tp_validate.releases import torchtitan_0_2, torchtitan_0_3, torchtitan_main

    return torchtitan_0_3, torchtitan_main, torchtitan_0_2


def nearest_line(source: Path | None = None) -> Release | None:
    """Return the line that a torchtitan is of, or is nearest to: that of whose contract it lacks the least.

    Args:
        source: the root of a checkout, instead of the installed torchtitan; without either, None is returned.
    """
    folder = package_folder("torchtitan", source)
    if folder is None:
        return None
    return min(releases(), key=lambda line: missing_names(gone_from(line.CONTRACT, folder)))


@functools.cache
def what_is_gone(source: Path | None = None) -> tuple[Gone, ...]:
    """Return what is read of torchtitan, and is not in one that is no tested release.

    Args:
        source: the root of a checkout, instead of the installed torchtitan.
    """
    folder = package_folder("torchtitan", source)
    # A release has everything, and is sooner told than read.
    if folder is None or torchtitan_identity(source).release is not None:
        return ()
    line = nearest_line(source)
    assert line is not None, "there is a folder"
    return gone_from(line.CONTRACT, folder)


def line_of(job_or_model: Any) -> Release:
    """Return the line of torchtitan whose parsed job, or whose model, this is.

    Raises:
        PlanError: it is of none that is known.
    """
    from torchtitan_tp_validate.releases import torchtitan_transformers

    config = torchtitan_transformers.find_config(job_or_model)
    if config is not None:
        return torchtitan_transformers.line_of_config(config)
    for release in releases():
        if release.is_job(job_or_model) or release.find_config(job_or_model) is not None:
            return release
    raise PlanError(f"{_describe(job_or_model)} is neither a job nor a model of a torchtitan that is known.")


def kv_replication_of(release: Release) -> KVReplication:
    """Return how KV-head replication goes into a run of a line; it is loaded now."""
    module: Any = importlib.import_module(release.KV_REPLICATION)
    replication: KVReplication = module
    return replication


def read_plan(model_or_config: Any, degrees: Degrees = _NO_DEGREES, *, model_name: str | None = None) -> Plan:
    """Read the sharded dimensions of a model, its config or its model args.

    A pipeline stage is judged by the whole model's config, which it carries: every stage, and so every
    rank, reaches the same verdict.

    Args:
        model_or_config: the object; recognized by its shape, not by its class, so that forks and
            user-defined models are read too.
        degrees: the run's; with expert parallelism, or another backend, other dimensions are split. The plan
            knows how to read the model at others.
        model_name: the name to show instead of the one derived from the object.

    Raises:
        PlanError: nothing here knows how to read the object, or what it holds is not a head count.
    """
    for reader in readers():
        config = reader.find_config(model_or_config)
        if config is not None:
            read = functools.partial(_read, reader, config, model_or_config)
            return bound(read, model_name=model_name)(degrees)
    raise PlanError(
        f"cannot find head counts in {_describe(model_or_config)}. Expected a torchtitan "
        "model, its config (0.3.x: with .layers) or its model args (0.2.x: with .n_heads), or a Hugging Face "
        "model or config (with num_attention_heads)."
    )


def _read(reader: Reader, config: Any, model: Any, degrees: Degrees) -> Plan:
    """Return a reader's plan, and with it what could not be judged by it in this torchtitan."""
    from torchtitan_tp_validate.releases import huggingface

    plan = reader.read(config, model, degrees)
    if reader is huggingface:
        return plan
    unread = tuple(f"{gone.unvalidated}: torchtitan {gone.what}" for gone in what_is_gone())
    return replace(plan, not_judged=(*plan.not_judged, *unread)) if unread else plan


def bound(read: Callable[[Degrees], Plan], *, model_name: str | None = None) -> Callable[[Degrees], Plan]:
    """Return what reads the plan at any degrees, each once; every plan that it gives carries it along.

    Args:
        read: reads the plan at some degrees.
        model_name: the name to show instead of the plan's own.
    """

    @functools.lru_cache(maxsize=_MOST_KEPT)
    def read_at(degrees: Degrees) -> Plan:
        plan = read(degrees)
        if degrees.replicate_kv_heads:
            plan = plan.with_kv_replication()
        return replace(plan, model=model_name or plan.model, degrees=degrees, read_at=read_at)

    return read_at


_MOST_KEPT = 128
"""How many plans of one model are kept, for as long as one of them is."""


def _describe(value: Any) -> str:
    return f"{shortened(value)} of type {type(value).__module__}.{type(value).__qualname__}"
