"""Llama 3 whose second layer has one KV head, at TP 2.

torchrun --nproc-per-node 2 0001-Validate-TP-degree-against-the-heads-of-every-layer.py
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import parallel_dims, spmd_types
from torchtitan.models.common.config_utils import make_gqa_config
from torchtitan.models.llama3 import model_registry

parallel_dims.device_type = "cpu"
dist.init_process_group("gloo")
tp = dist.get_world_size()
config = model_registry("debugmodel").model
first = config.layers[0].attention
config.layers[1].attention = make_gqa_config(
    dim=256, n_heads=16, n_kv_heads=1, fuse_qkv=True, rope=first.rope,
    wqkv_param_init={}, wo_param_init={}, inner_attention=first.inner_attention,
)  # fmt: skip
parallelism = ParallelismConfig(tensor_parallel_degree=tp)
config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
print("update_from_config accepts it")
model = config.build()
dims = parallel_dims.ParallelDims(1, 1, 1, tp, 1, 1, world_size=tp)
model.parallelize(dims)
with torch.no_grad(), spmd_types.set_current_spmd_mesh(dims.spmd_dense_mesh()):
    tokens = positions = torch.arange(128)
    model(tokens, positions, model.get_attention_masks(positions))
print("no error")
