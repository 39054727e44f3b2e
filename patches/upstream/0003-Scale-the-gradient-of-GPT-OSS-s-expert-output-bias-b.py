"""Gradients of gpt-oss's experts at TP 2, by FSDP, projected on those of one rank.

torchrun --nproc-per-node 2 0003-Scale-the-gradient-of-GPT-OSS-s-expert-output-bias-b.py
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import fsdp, parallel_dims, spmd_types
from torchtitan.models.gpt_oss import model_registry

parallel_dims.device_type = "cpu"
dist.init_process_group("gloo")
tp = dist.get_world_size()
parallelism = ParallelismConfig(tensor_parallel_degree=tp)
config = model_registry("debugmodel").model
config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
moe, reference = (config.layers[0].moe.build().bfloat16() for _ in range(2))
torch.manual_seed(0)
for param in reference.parameters():
    torch.nn.init.normal_(param, std=0.02)
moe.load_state_dict(reference.state_dict())
x = torch.randn(64, 256).bfloat16()
reference(x).sum().backward()

dims = parallel_dims.ParallelDims(1, 1, 1, tp, 1, 1, world_size=tp)
moe.parallelize(dims)
mesh, mesh_dims = fsdp.resolve_fsdp_mesh(dims)
fully_shard(moe, mesh=mesh, dp_mesh_dims=mesh_dims)
moe.set_force_sum_reduction_for_comms(True)  # gloo
with spmd_types.set_current_spmd_mesh(dims.spmd_dense_mesh()):
    moe(x.chunk(tp)[dist.get_rank()]).sum().backward()
expected = dict(reference.routed_experts.inner_experts.named_parameters())
for name, param in moe.routed_experts.inner_experts.named_parameters():
    grad, g = param.grad.full_tensor().float(), expected[name].grad.float()
    if dist.get_rank() == 0:
        print(f"{name:16} x {(grad * g).sum() / (g * g).sum():.3f}")
