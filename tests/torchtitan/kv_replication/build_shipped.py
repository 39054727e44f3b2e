"""Build and parallelize a config that torchtitan 0.3.0 ships, as one rank of a fake process group.

    python -m tests.torchtitan.kv_replication.build_shipped qwen35_122b_a10b 64

Prints as JSON what came out. Nothing is allocated: the model is on meta, and no other rank exists.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.distributed import parallel_dims
from torchtitan.models.qwen3_5 import config_registry
from torchtitan.tools import utils

import torchtitan_tp_validate
from tests.torchtitan.kv_replication.fake_rank import build, parallelize
from torchtitan_tp_validate.guards import guards_in_place
from torchtitan_tp_validate.job import Options, check_job


def main(name: str, world_size: int) -> None:
    utils.device_type = parallel_dims.device_type = "cpu"
    torchtitan_tp_validate.install(replicate_kv_heads=True)
    config = getattr(config_registry, name)()
    check_job(config, guarded=guards_in_place(), options=Options(replicate_kv_heads=True))

    model = build(config, world_size)
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    model = parallelize(config, model, world_size)
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
