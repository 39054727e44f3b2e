"""What a run asks for: the table of degrees, and the one way each to read them.

They are read from an int, a ``ParallelDims``, the arguments of a parallelize call, or a parsed job. Nothing
is loaded for it, neither torch nor torchtitan; what a loaded torchtitan has decided by itself is asked in
`device_type` and `token_field`, and nowhere else.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

from torchtitan_tp_validate.errors import TPDegreeError
from torchtitan_tp_validate.models import is_listed

FLAGS = {
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
}
"""Every degree that decides what is split: field of ``ParallelDims`` -> torchtitan's name of it under
``[parallelism]``, in every line. That is the config's field and the flag; in words, it is the `noun`."""

PIPELINE_FLAG = "pipeline_parallel_degree"
"""The same of the one degree that decides nothing: a stage is judged by the whole model's config."""

TOKEN_BUDGET = "num_tokens_per_microbatch_per_dp_rank"
"""What main has in the place of a local batch of sequences."""

TOKEN_FIELDS = ("seq_len", TOKEN_BUDGET)
"""What ``[training]`` calls the tokens that the TP axis splits between blocks: up to 0.3.0, and after."""

WHAT_IS_LEFT = -1
"""A data parallel shard degree that is left to the number of ranks."""


def noun(degree: str) -> str:
    """Return what people call a degree, by its field of ``ParallelDims``."""
    return FLAGS[degree].capitalize().replace("_", " ")


class Axis(Enum):
    """A mesh axis that splits dimensions; the value is the ``ParallelDims`` field of its degree."""

    TP = "tp"
    EP = "ep"
    FSDP = "dp_shard"

    @property
    def noun(self) -> str:
        """What people call the degree."""
        return noun(self.value)

    @property
    def flag(self) -> str:
        """torchtitan's field of the degree under ``[parallelism]``, in every line."""
        return FLAGS[self.value]


SHARDS_ARE_UNKNOWN = (
    f"{Axis.FSDP.flag} is left to the number of ranks, which is not known before the run starts"
)
"""Why a rule was left out that counts them."""


@dataclass(frozen=True)
class Degrees:
    """What a run asks for, as far as it decides what is split and how.

    Attributes:
        tp: tensor parallel degree.
        ep: expert parallel degree.
        cp: context parallel degree.
        etp: degree of tensor parallelism within experts under EP, of torchtitan 0.2.x: 1 or ``tp``.
        dp_shard: how many ranks shard the data and the parameters.
        dp_shard_is_known: whether that is so; where it is left to the number of ranks, ``dp_shard`` is the
            least that it can be, and what depends on it is not judged to the end.
        dp_replicate: how many times they do so.
        fsdp: whether torchtitan's own ``apply_fsdp`` does the sharding, be it over one rank.
        device_type: what the run is for, as torchtitan calls it; without an accelerator that is ``cuda``.
        spmd_backend: ``parallelism.spmd_backend`` of torchtitan 0.3.x.
        seq_len: ``training.seq_len``, in tokens, where it is known.
        sequence_parallel: ``parallelism.enable_sequence_parallel`` of torchtitan 0.3.x.
        replicate_kv_heads: whether several ranks may share a key-value head (``kv_replication``).
        in_trainer: whether torchtitan's Trainer runs it, which has checks of its own.
        by_own_function: whether a function of somebody's own parallelizes the model: of what it splits, the
            heads are known, and in 0.3.x all that the config declares.
    """

    tp: int
    ep: int = 1
    cp: int = 1
    etp: int = 1
    dp_shard: int = 1
    dp_shard_is_known: bool = True
    dp_replicate: int = 1
    fsdp: bool = True
    device_type: str = "cuda"
    spmd_backend: str = "spmd_types"
    seq_len: int | None = None
    sequence_parallel: bool = True
    replicate_kv_heads: bool = False
    in_trainer: bool = False
    by_own_function: bool = False

    def of(self, axis: Axis) -> int:
        """Return the degree of one axis."""
        degree: int = getattr(self, axis.value)
        return degree

    @property
    def splits_nothing(self) -> bool:
        """Whether the run has neither tensor nor expert parallelism; it is not judged then."""
        return self.tp == self.ep == 1

    @property
    def makes_a_mesh(self) -> bool:
        """Whether the ranks can be laid out so; torchtitan says so itself, before anything else."""
        return self.ep == 1 or self.dp_shard * self.cp * self.tp % (self.ep * self.etp) == 0

    @property
    def ranks(self) -> int:
        """How many ranks such a run has, in each stage of its pipeline."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    def vary(self, **changes: int) -> Degrees:
        """Return the same run with other degrees, by field, and with what follows from them.

        In torchtitan 0.2.x experts are split over the TP axis whole or not at all: an ``etp`` that is ``tp``
        remains it.
        """
        if "tp" in changes and self.etp == self.tp > 1:
            changes = {"etp": changes["tp"], **changes}
        return replace(self, **changes)  # type: ignore[arg-type]  # which field has which type


def read_degrees(parallel_dims: Any) -> Degrees:
    """Return the degrees of a ``ParallelDims``, or of an int that is the TP degree.

    Raises:
        TPDegreeError: one is not a positive whole number. ``True`` is not one: it is a flag that ended up
            in the wrong place.
    """
    if not hasattr(parallel_dims, "tp"):
        return Degrees(tp=_degree(parallel_dims, Axis.TP.noun, ""), device_type=device_type())
    source = type(parallel_dims).__name__
    read: dict[str, Any] = {
        field: _degree(getattr(parallel_dims, field, 1), noun(field), f" (from {source}.{field})")
        for field in FLAGS
    }
    return Degrees(
        **read,
        device_type=device_type(),
        spmd_backend=getattr(parallel_dims, "spmd_backend", Degrees.spmd_backend),
    )


def degrees_of_call(arguments: Mapping[str, Any]) -> Degrees:
    """Return the degrees of a call of a parallelize function: 0.2.x hands over a job config, 0.3.x its parts.

    Args:
        arguments: name -> value.

    Raises:
        TPDegreeError: a degree is not a positive whole number.
    """
    job = arguments.get("job_config")
    parallelism = arguments.get("parallelism", getattr(job, "parallelism", None))
    return replace(
        read_degrees(arguments["parallel_dims"]),
        seq_len=_tokens(training_of_call(arguments)),
        sequence_parallel=getattr(parallelism, "enable_sequence_parallel", True),
    )


def training_of_call(arguments: Mapping[str, Any]) -> Any:
    """Return ``[training]`` of a call of a parallelize function, or None when it has none."""
    return arguments.get("training", getattr(arguments.get("job_config"), "training", None))


def degrees_of_job(config: Any) -> Degrees:
    """Return the degrees of a parsed job, its data parallel one only if not left to the number of ranks.

    Args:
        config: a ``Trainer.Config`` (0.3.x) or ``JobConfig`` (0.2.x).

    Raises:
        TPDegreeError: a degree is not a positive whole number.
    """
    parallelism = config.parallelism
    requested = {
        ours: getattr(parallelism, theirs) for ours, theirs in FLAGS.items() if hasattr(parallelism, theirs)
    }
    dp_shard_is_known = True
    if requested.get(Axis.FSDP.value) == WHAT_IS_LEFT:
        # The number of ranks tells; the guard of the parallelize function hears it.
        del requested[Axis.FSDP.value]
        dp_shard_is_known = False
    requested["spmd_backend"] = getattr(parallelism, "spmd_backend", Degrees.spmd_backend)
    return replace(
        read_degrees(SimpleNamespace(**requested)),
        dp_shard_is_known=dp_shard_is_known,
        seq_len=_tokens(getattr(config, "training", None)),
        sequence_parallel=getattr(parallelism, "enable_sequence_parallel", True),
        in_trainer=True,
    )


def applies_fsdp(function: Callable[..., Any]) -> bool:
    """Return whether a parallelize function shards the data by torchtitan's own ``apply_fsdp``.

    The functions of its models do. The experiments' copies have means of their own (simple_fsdp), which cut
    other dimensions, and cut them unevenly too.
    """
    module: str = inspect.unwrap(function).__module__
    return module.startswith("torchtitan.models.") and is_listed(module)


def device_type() -> str:
    """Return what torchtitan has decided to run on, if it is loaded; else what it is made for."""
    return getattr(_loaded("torchtitan.tools.utils"), "device_type", Degrees.device_type)


def token_field() -> str:
    """Return what torchtitan, if it is loaded, calls the tokens that are split; else what 0.3.0 does."""
    config = getattr(_loaded("torchtitan.config"), "TrainingConfig", None)
    fields = getattr(config, "__dataclass_fields__", {})
    return next((field for field in TOKEN_FIELDS if field in fields), TOKEN_FIELDS[0])


def _loaded(module: str) -> Any:
    """Return a module of torchtitan, or None; where it is not loaded, nothing is decided yet."""
    return sys.modules.get(module)


def _tokens(training: Any) -> int | None:
    """How many tokens of ``[training]`` are split over the TP axis, or None where it does not say."""
    return next((getattr(training, field) for field in TOKEN_FIELDS if hasattr(training, field)), None)


def _degree(value: Any, noun: str, where: str) -> int:
    if not isinstance(value, bool):
        try:
            degree = operator.index(value)
        except TypeError:
            pass
        else:
            if degree >= 1:
                return degree
    raise TPDegreeError(
        f"{noun} must be a whole number of at least 1, got {value!r} "
        f"of type {type(value).__name__}{where}. Pass torchtitan's ParallelDims or an int."
    )
