"""wk of Qwen3.5 122B-A10B, which has 2 KV heads, over the 4 TP ranks of its config.

torchrun --nproc-per-node 4 0006-Share-a-KV-head-between-TP-ranks-with-replicate_kv_h.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchtitan.distributed import parallel_dims, spmd_types
from torchtitan.models.qwen3_5.config_registry import qwen35_122b_a10b

parallel_dims.device_type = "cpu"
config = qwen35_122b_a10b()
tp = config.parallelism.tensor_parallel_degree
attention = config.model_spec.model.first_attention
n_kv_heads = attention.n_kv_heads
config.model_spec.model.update_from_config(config=config)

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
wk = attention.wk.build()
weight = torch.nn.init.normal_(wk.weight).detach().clone().requires_grad_()
x = torch.randn(8, attention.wk.in_features)
loss_weights = torch.randn(tp, 8, attention.head_dim)
heads = F.linear(x, weight).chunk(n_kv_heads, dim=-1)
of_rank = [heads[i * n_kv_heads // tp] for i in range(tp)]
(torch.stack(of_rank) * loss_weights).sum().backward()

dims = parallel_dims.ParallelDims(1, 1, 1, tp, 1, 1, world_size=tp)
wk.parallelize(dims)
with spmd_types.set_current_spmd_mesh(dims.spmd_dense_mesh()):
    out = wk(x)
(out * loss_weights[rank]).sum().backward()
torch.testing.assert_close(out, of_rank[rank])
torch.testing.assert_close(wk.weight.grad, weight.grad.chunk(tp)[rank])
dist.barrier()
if rank == 0:
    print("keys and gradients of all ranks are those of one process")
