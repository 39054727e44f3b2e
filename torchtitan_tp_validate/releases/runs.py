"""What a parsed job says of its run as a whole, in the fields that all lines of torchtitan share.

Source: ``config/job_config.py`` of torchtitan 0.2.x, ``config/configs.py`` and ``trainer.py`` of 0.3.0 and
main.
"""

from __future__ import annotations

import copy
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, TOKEN_BUDGET, Degrees
from torchtitan_tp_validate.layout import MICROBATCHES_FIELD, Pipeline, Sizes
from torchtitan_tp_validate.releases.sources import Source

_REAL_RANKS = ("default", "torchcomms")
"""Values of ``comm.mode`` with as many processes as ranks."""


SPLIT_BACKWARD = Source(
    "distributed/pipelining/_backward.py", "map(_get_grad_fn_or_grad_acc, weights)", package="torch"
)
"""Where torch looks for the weights whose gradients are computed apart: by the parameters of a stage."""

PIPELINE_FIELDS = {
    "degree": PIPELINE_FLAG,
    "schedule": "pipeline_parallel_schedule",
    "layers_per_stage": "pipeline_parallel_layers_per_stage",
    "first_less": "pipeline_parallel_first_stage_less_layers",
    "last_less": "pipeline_parallel_last_stage_less_layers",
    "parts": "module_fqns_per_model_part",
    "microbatch_size": "pipeline_parallel_microbatch_size",
    "microbatches": MICROBATCHES_FIELD,
    "from_file": "pipeline_parallel_schedule_csv",
}
"""Field of `Pipeline` -> torchtitan's under ``[parallelism]``. One that a fork lacks has our default."""


def read_pipeline(parallelism: Any, *, is_supported: bool) -> Pipeline:
    """Return how ``[parallelism]`` cuts a model into stages."""
    read = {
        ours: getattr(parallelism, theirs)
        for ours, theirs in PIPELINE_FIELDS.items()
        if hasattr(parallelism, theirs)
    }
    if read.get("parts") is not None:
        read["parts"] = tuple(map(tuple, read["parts"]))
    return replace(Pipeline(is_supported=is_supported), **read)


SIZES = (
    Sizes(),
    Sizes(TOKEN_BUDGET, "num_tokens_per_train_step", TOKEN_BUDGET, in_a_row=True),
)
"""What the lines call them: in sequences, and main in tokens."""


def read_batches(job: Any) -> dict[str, Any]:
    """Return the batch sizes of ``[training]``, by field of `Run`."""
    training = getattr(job, "training", None)
    sizes = next((sizes for sizes in SIZES if hasattr(training, sizes.local)), SIZES[0])
    total = getattr(training, sizes.total, -1)
    # A negative one is what the ranks make of it.
    return {
        "sizes": sizes,
        "local_batch_size": getattr(training, sizes.local, None),
        "global_batch_size": None if total < 0 else total,
    }


_RECOMPUTED = ("FullAC.Config", "MemoryBudgetAC.Config")
"""Of 0.3.x. Under the first a compiled model has nothing to give away; the second was not measured."""


def read_backward(job: Any) -> dict[str, Any]:
    """Return what of a job changes how a pipeline computes gradients, by field of `Run`."""
    checkpointing, loss = (getattr(job, name, None) for name in ("activation_checkpoint", "loss"))
    selective = getattr(checkpointing, "mode", "") == "selective"
    by_operation = selective and getattr(checkpointing, "selective_ac_option", "") == "op"  # 0.2.x
    resharding = getattr(job.parallelism, "fsdp_reshard_after_forward", "default")
    compile = getattr(job, "compile", None)
    components = getattr(compile, "components", ()) if getattr(compile, "enable", False) else ()
    recomputed = any(_is_a(checkpointing, name) for name in _RECOMPUTED)
    return {
        "gives_buffers_away": "loss" in components or ("model" in components and not recomputed),
        "recomputes_selectively": by_operation or _is_a(checkpointing, "SelectiveAC.Config"),
        "shards_before_backward": resharding == "always" or _is_a(loss, "ChunkedLossWrapper.Config"),
    }


def _is_a(config: Any, name: str) -> bool:
    return any(base.__qualname__ == name for base in type(config).__mro__)


def has_real_ranks(job: Any) -> bool:
    """Return whether the ranks of a job are the processes that torchrun starts."""
    return getattr(getattr(job, "comm", None), "mode", "default") in _REAL_RANKS


def own_words(error: Exception) -> str:
    """Return what torchtitan's own code objects to, in one line; nothing where the error is not its own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = getattr(sys.modules.get("torchtitan"), "__path__", ())
    raised_in = Path(trace.tb_frame.f_code.co_filename) if trace else None
    is_check = isinstance(error, (ValueError, NotImplementedError, RuntimeError, AssertionError))
    if raised_in is None or not is_check or not any(raised_in.is_relative_to(folder) for folder in package):
        return ""
    return " ".join(str(error).split()).removesuffix(".")


class _Reached(BaseException):
    """A parallelize function has no more to say before it works on the model."""


def refusal_of(
    function: Callable[..., Any],
    model: Mapping[str, Any],
    degrees: Degrees,
    pp: int,
    given: Mapping[str, Any],
) -> str:
    """Return what torchtitan's own parallelize function, or its mesh, says of a run before it is split.

    It is called with a model that it cannot touch and a mesh that it cannot have, so that it gets no further
    than to its checks; no device and no process group is touched. Empty where it has nothing to say.

    Args:
        function: the function, guarded or not.
        model: what it may read of the model, by attribute: its config.
        degrees: the run's, which must make a mesh.
        pp: its pipeline parallel degree.
        given: its other arguments, by name.
    """
    function = inspect.unwrap(function)
    # Its module has imported the class, for its signature.
    parallel_dims = function.__globals__.get("ParallelDims")
    if not function.__module__.startswith("torchtitan.") or parallel_dims is None:
        return ""
    try:
        dims = _without_mesh(parallel_dims, degrees, pp)
    except AssertionError as error:
        # A release can want more of a mesh than that its ranks make one: 0.2.0 has EP borrow whole axes.
        wanted = traceback.extract_tb(error.__traceback__)[-1].line or ""
        return own_words(error) or f"ParallelDims wants {wanted.removeprefix('assert ')}"
    arguments = {**given, "model": _untouchable(model), "parallel_dims": dims}
    parameters = inspect.signature(function).parameters.values()
    if any(p.name not in arguments and p.default is p.empty for p in parameters):
        return ""
    try:
        function(**{p.name: arguments[p.name] for p in parameters if p.name in arguments})
    except _Reached:
        return ""
    except Exception as error:
        return own_words(error)
    return ""


def _untouchable(known: Mapping[str, Any]) -> Any:
    class Model:
        def __getattribute__(self, name: str) -> Any:
            if name in known:
                return known[name]
            raise _Reached

    return Model()


_MESHES = ("pp", "dp_replicate", "cp", "tp", "ep")
"""Axes that a ``ParallelDims`` has a mesh of under their own name, and none where their degree is 1."""


def _without_mesh(parallel_dims: type, degrees: Degrees, pp: int) -> Any:
    """Return a ``ParallelDims`` of these degrees that gives nobody a mesh, and says so where it has none."""

    def reached(*_: Any, **__: Any) -> Any:
        raise _Reached

    def get_optional_mesh(self: Any, dims: Any) -> None:
        if dims not in _MESHES or self._mesh_exist(dims, getattr(self, dims)):
            raise _Reached

    methods = {"build_mesh": reached, "get_optional_mesh": get_optional_mesh}
    fields = inspect.signature(parallel_dims).parameters
    named = {field: getattr(degrees, field) for field in (*FLAGS, "spmd_backend") if field in fields}
    return type("Dims", (parallel_dims,), methods)(**named, pp=pp, world_size=degrees.ranks * pp)


def async_refusal(function: Callable[..., Any], job: Any) -> str:
    """Return what a parallelize function of 0.2.x says of async tensor parallelism, once the model is split.

    Empty where it has nothing to say, or where the model is compiled, as async tensor parallelism wants.
    """
    ask = inspect.unwrap(function).__globals__.get("maybe_enable_async_tp")
    section = getattr(job, "compile", None)
    is_compiled = getattr(section, "enable", False) and "model" in getattr(section, "components", ())
    if ask is None or is_compiled:
        return ""
    try:
        ask(job, None)
    except RuntimeError as error:
        return own_words(error)
    return ""


def updated_args(args: Any, job: Any) -> Any:
    """Return a copy of model args of 0.2.x that torchtitan has updated for a job.

    Raises:
        Exception: whatever torchtitan objects to.
    """
    updated = copy.deepcopy(args)
    updated.update_from_config(job)
    return updated
