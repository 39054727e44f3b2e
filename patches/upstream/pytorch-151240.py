"""local_map loses the gradient of an argument that a collective is still filling.

torchrun --nproc-per-node 2 pytorch-151240.py
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
replicate = [Replicate()]
multiply = local_map(
    torch.mul, out_placements=replicate, in_placements=(replicate, replicate)
)
for async_op in (False, True):
    x = distribute_tensor(torch.ones(4), mesh, [Shard(0)]).requires_grad_()
    w = distribute_tensor(torch.ones(4), mesh, replicate).requires_grad_()
    gathered = x.redistribute(placements=replicate, async_op=async_op)
    multiply(gathered, w).sum().backward()
    grads = [None if p.grad is None else p.grad.to_local() for p in (x, w)]
    if dist.get_rank() == 0:
        print(f"async_op={async_op}: x.grad={grads[0]}, w.grad={grads[1]}")
