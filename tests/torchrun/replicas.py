"""A rank of `test_replicas`: ``python -m tests.torchrun.replicas HOW``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torchtitan.components.optimizer import OptimizersContainer

import torchtitan_tp_validate as tpv
from tests.torchrun.ending import end_rank
from torchtitan_tp_validate.errors import ReplicaError


def main(how: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
    model = nn.Module()
    for name, placement in (("gate", Replicate()), ("norm", Replicate()), ("wq", Shard(0))):
        whole = torch.arange(8.0).reshape(4, 2)
        model.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0), placement])))
    container = OptimizersContainer.__new__(OptimizersContainer)
    container.model_parts = [model]
    container.optimizers = [torch.optim.SGD(model.parameters(), lr=0.0)]
    original = OptimizersContainer.step
    tpv.install(check_replicas=2)
    for _ in range(3):
        container.step()
    if how == "drift" and rank == 1:
        with torch.no_grad():
            model.norm.to_local()[0, 1] += 1e-6
    try:
        container.step()
        print(f"rank {rank}: equal", flush=True)
    except ReplicaError as error:
        print(f"rank {rank}: {error}", flush=True)
    tpv.uninstall()
    assert OptimizersContainer.step is original
    end_rank()


if __name__ == "__main__":
    main(sys.argv[1])
