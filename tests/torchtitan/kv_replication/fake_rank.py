"""What a Trainer of torchtitan 0.3.x does up to its sharded model, as one rank of a fake process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend


def build(config: Any, world_size: int) -> torch.nn.Module:
    """Return the model of a job, on meta, among so many ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    set_spmd_backend(config.parallelism.spmd_backend)
    model = config.model_spec.model
    model.update_from_config(config=config)
    with torch.device("meta"):
        return model.build()


def parallelize(config: Any, model: torch.nn.Module, world_size: int) -> torch.nn.Module:
    """Return the model, parallelized as its job says."""
    return config.model_spec.parallelize_fn(
        model,
        parallel_dims=ParallelDims.from_config(config.parallelism, world_size),
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder="",
    )
