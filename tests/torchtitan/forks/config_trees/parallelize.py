"""Its parallelization: what its config declares, and FSDP."""

from __future__ import annotations

from typing import Any

from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder


def parallelize_own(model: Any, *, parallel_dims: ParallelDims, **how: Any) -> Any:
    """Split the model over TP and data parallel ranks."""
    if parallel_dims.tp_enabled:
        model.parallelize(parallel_dims)
    return apply_fsdp_to_decoder(model, parallel_dims.get_mesh(["fsdp"]), **how)
