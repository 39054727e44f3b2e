"""Gradients of gpt-oss's attention.wo at TP 2, projected on those of one rank.

torchrun --nproc-per-node 2 0004-Sum-the-gradient-of-GPT-OSS-s-output-bias-over-TP.py
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import parallel_dims, utils
from torchtitan.models.gpt_oss import model_registry

parallel_dims.device_type = "cpu"
dist.init_process_group("gloo")
tp, backend = dist.get_world_size(), "partial_dtensor"
utils.set_spmd_backend(backend)
parallelism = ParallelismConfig(tensor_parallel_degree=tp, spmd_backend=backend)
config = model_registry("debugmodel").model
config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
linear, reference = (config.layers[0].attention.wo.build() for _ in range(2))
torch.manual_seed(0)
for param in reference.parameters():
    torch.nn.init.normal_(param, std=0.02)
linear.load_state_dict(reference.state_dict())
x = torch.randn(64, reference.in_features)
reference(x).sum().backward()

dims = parallel_dims.ParallelDims(1, 1, 1, tp, 1, 1, tp, backend)
linear.parallelize(dims)
fully_shard(linear, mesh=dims.get_mesh("fsdp"))
linear.set_force_sum_reduction_for_comms(True)  # gloo
linear(distribute_tensor(x, dims.get_mesh("tp"), [Shard(1)])).sum().backward()
for name, param in linear.named_parameters():
    grad, g = param.grad.full_tensor(), getattr(reference, name).grad
    if dist.get_rank() == 0:
        print(f"attention.wo.{name:6} x {(grad * g).sum() / (g * g).sum():.3f}")
