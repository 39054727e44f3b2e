"""Build and parallelize a config that torchtitan 0.3.0 ships, as one rank of a fake process group.

    python -m tests.torchtitan.kv_replication.build_shipped qwen35_122b_a10b 64

Prints as JSON what came out. Nothing is allocated: the model is on meta, and no other rank exists.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.qwen3_5 import config_registry
from torchtitan.tools import utils

import torchtitan_tp_validate
from torchtitan_tp_validate.guards import guards_in_place
from torchtitan_tp_validate.job import Options, check_job


def main(name: str, world_size: int) -> None:
    utils.device_type = parallel_dims.device_type = "cpu"
    torchtitan_tp_validate.install(replicate_kv_heads=True)
    config = getattr(config_registry, name)()
    check_job(config, guarded=guards_in_place(), options=Options(replicate_kv_heads=True))

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    set_spmd_backend(config.parallelism.spmd_backend)
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = spec.model.build()
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    model = spec.parallelize_fn(
        model,
        parallel_dims=ParallelDims.from_config(config.parallelism, world_size),
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder="",
    )
    print(json.dumps({"tp": config.parallelism.tensor_parallel_degree, "wk": _projections(model, names)}))


def _projections(model: torch.nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[Any]:
    """``(shape in the model, shape over all ranks, shape on this rank)`` of each wk and wv."""
    found = []
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and name.endswith((".wk.weight", ".wv.weight")):
            assert isinstance(parameter, DTensor)
            found.append((shapes[name], tuple(parameter.shape), tuple(parameter.to_local().shape)))
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
