"""Its parallelization, by a plan of its own."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims


def parallelize_own(model: Any, parallel_dims: ParallelDims, job_config: JobConfig) -> Any:
    """Split the attention over TP ranks."""
    if parallel_dims.tp_enabled:
        for block in model.layers.values():
            plan = {
                "attention.wq": ColwiseParallel(use_local_output=False),
                "attention.wk": ColwiseParallel(use_local_output=False),
                "attention.wv": ColwiseParallel(use_local_output=False),
                "attention.wo": RowwiseParallel(),
            }
            parallelize_module(block, parallel_dims.get_mesh("tp"), plan)
    return model
