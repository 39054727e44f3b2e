"""How to build and run each model family of a torchtitan line on whatever device there is.

One file per line (`torchtitan_0_2`, `torchtitan_0_3`), each with the same names:

- ``FAMILIES``: the families that the tests train; ``MORE_FAMILIES``: the others that ``build`` understands.
- ``SHARED_KV_HEADS``: those that KV-head replication is tried on.
- ``SIZES``: what ``build`` can set besides the head counts, by family; ``HEAD_DIM``: rows of a head.
- ``BACKENDS``: the values of ``spmd_backend`` that each family runs under, the default first, ``(None,)``
  where there is no choice; ``STRIDE``: of the truth cases dealt out to them, one in this many is run.
- ``HAS_HEAD_CHECK``: whether torchtitan itself refuses head counts when the model is configured.
- ``FUSED_QKV``: the families whose stock model has a fused QKV projection.
- ``prepare(device_type)``: called once per process, before the first process group; on ``"cpu"`` it
  puts the few pure-torch stand-ins in place that torchtitan's GPU kernels need there.
- ``build(family, *, n_heads, n_kv_heads, tp, ep=1, upstream_check=True, ...)``: a `TinyModel` at debug size,
  set up for a run at the degrees ``tp`` and ``ep`` (and, on 0.2.x, ``etp``). ``upstream_check=False`` takes
  torchtitan's own head check out of the way, so that the failure behind it is seen.
- ``replicate_kv_heads(model, tp)``: lets ranks share the KV heads of a model that was built for it, without
  any check.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class TinyModel:
    """A real torchtitan model on the meta device and what it takes to train it.

    Attributes:
        model: the module, on meta, in fp32, not parallelized.
        parallelize_fn: the function that torchtitan's own registry hands out for this family
            (``TrainSpec.parallelize_fn`` or ``ModelSpec.parallelize_fn``), looked up at build time.
        entry_point: (module, function) where upstream defines that function.
        wrapper: the name of our module under ``torchtitan_tp_validate.wrappers``.
        make_parallel_dims: ``(tp, world_size) -> ParallelDims``; data parallel takes what is left.
        arguments: ``ParallelDims -> (args, kwargs)`` that follow the model in the call.
        initialize: ``(model, device) -> None``: materialise on device and draw the weights; the same
            under any seed that the caller set, so that TP = 1 is a reference.
        loss: ``(model, tokens, labels) -> scalar``, tokens and labels of shape (batch, seq_len).
        vocab_size: upper bound of token ids; seq_len: the sequence length to feed.
        hf_adapter: torchtitan's adapter between this model's state dict and Hugging Face's.
    """

    model: nn.Module
    parallelize_fn: Callable[..., nn.Module]
    entry_point: tuple[str, str]
    wrapper: str
    make_parallel_dims: Callable[[int, int], Any]
    arguments: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
    initialize: Callable[[nn.Module, torch.device], None]
    loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    vocab_size: int
    seq_len: int
    hf_adapter: Callable[[], Any]


def installed_line() -> ModuleType:
    """Return the module for the torchtitan that is installed."""
    from torchtitan_tp_validate.registry import has_configs

    # By what it registers: main has the number of an earlier release.
    return importlib.import_module(f"{__name__}.torchtitan_{'0_3' if has_configs() else '0_2'}")


def sum_gradients_without_nccl(model: nn.Module) -> None:
    """Let data parallelism reduce gradients by a plain sum: gloo has no sum with a factor.

    Where one rank alone holds a shard there is no sum, and torch would divide by a factor of torchtitan's
    (0.2.0 and 0.2.1, experts) once in place of it, and once more behind it.
    Source: ``torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py`` (foreach_reduce) of torch 2.13.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            state = module._get_fsdp_state()
            # An older torch has one group, or None; a newer one refuses that name where there are more.
            many = hasattr(state, "_fsdp_param_groups")
            for group in state._fsdp_param_groups if many else filter(None, [state._fsdp_param_group]):
                if group.mesh_info.shard_mesh_size == 1 and group.gradient_divide_factor is not None:
                    group.force_sum_reduction_for_comms = False
