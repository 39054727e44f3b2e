"""A split backward misses the gradients of weights that FSDP has sharded again.

python pytorch-split-backward.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import _backward

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
for reshard in (False, True):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        layer.set_reshard_after_backward(False)  # as a stage does, like the next
        layer.set_requires_gradient_sync(False)
    x = torch.eye(2, requires_grad=True)
    _, groups = _backward.stage_backward_input(
        [model(x).sum()], None, [x], model.parameters()
    )
    _backward.stage_backward_weight(model.parameters(), groups)
    found = sum(parameter.grad is not None for parameter in model.parameters())
    print(f"reshard_after_forward={reshard}: {found} of 4 parameters have a gradient")
