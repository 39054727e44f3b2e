"""What a file of this folder knows of the upstream release that it is for.

A file that describes models is a `Reader`; that of a line of torchtitan, which parses jobs and registers
models, is a `Release`. What replicates key-value heads in a line is a `KVReplication`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.layout import Run
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.releases.contract import Reads
from torchtitan_tp_validate.releases.sources import Source


class Reader(Protocol):
    """A way to describe a model: how such a description is recognized, and how it is read."""

    def find_config(self, model_or_config: Any) -> Any | None:
        """Return what `read` wants of a model or of its config, or None when this is neither."""

    def read(self, config: Any, model: Any, degrees: Degrees) -> Plan:
        """Return what the model's parallelization splits at these degrees.

        Args:
            config: what `find_config` gave.
            model: what it was given.
            degrees: of the run.

        Raises:
            PlanError: the config does not tell.
        """


@dataclass(frozen=True)
class RequestedModel:
    """A model as a line of torchtitan describes it.

    Attributes:
        name: model and flavor as torchtitan calls them.
        config: the model's config (0.3.x) or model args (0.2.x).
        parallelize_fn: the `called_function` of the model's spec.
        has_pipelines: whether the spec names a function that splits the model into pipeline stages.
    """

    name: str
    config: Any
    parallelize_fn: Callable[..., Any]
    has_pipelines: bool = True


def called_function(named: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that is called in the end, where a spec names a partial or an object."""
    while isinstance(named, functools.partial):
        named = named.func
    return named if inspect.isroutine(named) else type(named).__call__


@dataclass(frozen=True)
class SpmdBackend:
    """A way of a line to tell ranks what they have of a tensor.

    Attributes:
        name: as in ``parallelism.spmd_backend``.
        pads_uneven_shards: it pads a shard that is smaller than others and goes on, wrongly; the others can
            tell it, and fail on empty ones only.
        shards_over_data_only: its FSDP mesh is that of the data alone; the others hand FSDP the TP axis too.
        wraps_attention: context parallelism wraps the attention modules of each stage, of any kind.
    """

    name: str
    pads_uneven_shards: bool = False
    shards_over_data_only: bool = False
    wraps_attention: bool = False


class Release(Reader, Protocol):
    """A line of torchtitan: its models, its jobs, what it registers.

    Attributes:
        CONFIG_REGISTRY: the module of a model's package whose functions build its training configs; empty
            where those are TOML files.
        TRAINER_MODULE: the module that defines its ``Trainer``.
        KV_REPLICATION: the name of the module that is its `KVReplication`, loaded when it is asked for.
        SPMD_BACKENDS: what ``parallelism.spmd_backend`` may name; nothing where there is no such field.
        CONTRACT: every name of its source that is read.
        FAULT_SOURCES: code of `rules.FAULTS` -> the fault in the source of the releases that have it.
    """

    CONFIG_REGISTRY: str
    TRAINER_MODULE: str
    KV_REPLICATION: str
    SPMD_BACKENDS: tuple[SpmdBackend, ...]
    CONTRACT: tuple[Reads, ...]
    FAULT_SOURCES: Mapping[str, Source]
    __name__: str

    def is_job(self, job: Any) -> bool:
        """Return whether this is what the line's command line is parsed to."""

    def named_model(self, job: Any) -> tuple[str, str] | None:
        """Return the model and the flavor that a job names; None where a job carries its model."""

    def requested_model(self, job: Any) -> RequestedModel | None:
        """Return the model that a job is about, or None when there is none or it is not known."""

    def in_run(self, config: Any, run: Any) -> Any:
        """Return what to judge of a job: its model's config, with the run where it decides what is split."""

    def read_run(self, job: Any, model: RequestedModel, degrees: Degrees, broken: Collection[str]) -> Run:
        """Return what a job says of its run as a whole; the number of ranks is none of it.

        Args:
            job: it is left as it is.
            model: the one that it is about, whose function is torchtitan's own or guarded.
            degrees: its own, with the data parallel shard degree where the number of ranks tells it.
            broken: the codes of the rules that its model's dimensions break, so that torchtitan is not asked
                for what is said already.
        """

    def flavors(
        self, package: ModuleType, model_package: Callable[[], ModuleType]
    ) -> dict[str, Callable[[], RequestedModel]] | None:
        """Return what a package registers, by flavor; None where it registers nothing in the line's way.

        Args:
            package: of a model, an experiment or a user.
            model_package: gives the model's own package where that of an experiment leans on it.
        """


class KVReplication(Protocol):
    """How KV-head replication goes into a run of one line of torchtitan."""

    def put_into_job(self, job: Any) -> None:
        """Put it into a job before anything is built, where that is the line's way.

        Raises:
            KVReplicationError: the job asks for something that it is not supported with.
        """

    def accept(self, model: RequestedModel, job: Any) -> None:
        """Let a job start whose model fits its degrees, or refuse what it loads and saves.

        Raises:
            KVReplicationError: another function than torchtitan's own parallelizes the model.
        """

    def put_into_call(self, function: Callable[..., Any], arguments: Mapping[str, Any], tp: int) -> None:
        """Put it into the model of a parallelize call, or see that it is there.

        Args:
            function: torchtitan's function.
            arguments: those of the call, by name.
            tp: its tensor parallel degree, compatible with the model under replication.

        Raises:
            KVReplicationError: the function, the model or the job does not go with it.
        """
