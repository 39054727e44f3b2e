"""The torchtitan 0.2.x families at debug size: same code path as a real run, a few hundred kilobytes.

Every family comes from the train spec that torchtitan's own Trainer would ask for, and keeps its
registered debug flavour but for the sizes. Two sizes are named by the caller (the head counts); the
others divide by every degree that the tests use, so that the heads alone decide the outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from . import TinyModel

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES = ("llama3", "llama4", "qwen3", "qwen3_moe")

SEQ_LEN = 32
VOCAB_SIZE = 256
HEAD_DIM = 16

_NAMES = {"qwen3_moe": "qwen3"}
_FLAVORS = {"qwen3_moe": "debugmodel_moe"}
_FUNCTIONS = {"llama3": "parallelize_llama", "llama4": "parallelize_llama", "qwen3": "parallelize_qwen3"}

_until_exit = ExitStack()


def prepare(device_type: str) -> None:
    """Make this process able to train the families in fp32 on `device_type`."""
    from torch.distributed.tensor.experimental import implicit_replication
    from torch.distributed.tensor.parallel import loss_parallel

    # The logits leave the model sharded over the vocabulary, torchtitan's default. The Trainer keeps
    # this context open over forward and backward; the worker calls backward after `loss` returned.
    _until_exit.enter_context(loss_parallel())
    # fp32 leaves torchtitan's attention the math kernel only, which adds a plain causal mask to the
    # DTensors that qwen3 brings as far as that.
    _until_exit.enter_context(implicit_replication())
    if device_type == "cpu":
        _stand_in_for_gpu_kernels()


def build(family: str, *, n_heads: int, n_kv_heads: int, tp: int, upstream_check: bool = True) -> TinyModel:
    """A tiny model of `family` with these head counts, configured for a run at degree `tp`.

    0.2.x has no head check of its own to take out of the way.
    """
    del upstream_check
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; torchtitan 0.2.x has {', '.join(FAMILIES)}")

    import torch
    from torchtitan.protocols.train_spec import get_train_spec

    name = _NAMES.get(family, family)
    spec = get_train_spec(name)
    flavor = _FLAVORS.get(family, "debugmodel")
    model_args = _tiny(family, spec.model_args[flavor], n_heads, n_kv_heads)
    model_args.update_from_config(_job_config(name, flavor, tp=tp))
    with torch.device("meta"):
        model = spec.model_cls(model_args)

    return TinyModel(
        model=model,
        parallelize_fn=spec.parallelize_fn,
        entry_point=(f"torchtitan.models.{name}.infra.parallelize", _FUNCTIONS[name]),
        wrapper=name,
        make_parallel_dims=_parallel_dims,
        arguments=lambda dims: ((dims, _job_config(name, flavor, tp=dims.tp)), {}),
        initialise=_initialise,
        loss=_loss,
        vocab_size=VOCAB_SIZE,
        seq_len=SEQ_LEN,
    )


def _tiny(family: str, args: Any, n_heads: int, n_kv_heads: int) -> Any:
    sizes: dict[str, Any] = {
        "n_layers": 2,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": VOCAB_SIZE,
    }
    if family.startswith("qwen3"):
        sizes |= {"dim": 64, "head_dim": HEAD_DIM, "hidden_dim": 128, "moe_inter_dim": 64}
        # 0.2.0 loses the tie under tensor parallelism, so that its parameters are others than without.
        sizes["enable_weight_tying"] = False
    else:
        # head_dim is dim // n_heads here; multiple_of rounds the feed-forward up to a multiple of 64.
        sizes |= {"dim": HEAD_DIM * n_heads, "multiple_of": 64}
    if family in ("llama4", "qwen3_moe"):
        sizes["moe_args"] = replace(
            args.moe_args,
            num_experts=8,
            top_k=2,
            # False (the qwen3 flavours' own value) gives the router wrong gradients under any tensor
            # parallel degree in torchtitan 0.2.x: an upstream fault that has nothing to do with heads.
            score_before_experts=True,
            # The grouped kernel rounds to bfloat16.
            use_grouped_mm=False,
        )
    return replace(args, **sizes)


def _job_config(name: str, flavor: str, *, tp: int) -> Any:
    from torchtitan.config import JobConfig

    config = JobConfig()
    config.model.name = name
    config.model.flavor = flavor
    config.training.seq_len = SEQ_LEN
    config.parallelism.tensor_parallel_degree = tp
    return config


def _parallel_dims(tp: int, world_size: int) -> Any:
    from torchtitan.distributed import ParallelDims

    return ParallelDims(dp_replicate=1, dp_shard=-1, cp=1, tp=tp, pp=1, ep=1, etp=1, world_size=world_size)


def _initialise(model: nn.Module, device: torch.device) -> None:
    import torch

    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()


def _loss(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    logits = model(tokens)
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def _stand_in_for_gpu_kernels() -> None:
    import torch
    from torch.nn.attention import SDPBackend
    from torchtitan.distributed import parallel_dims
    from torchtitan.models.attention import ScaledDotProductAttentionWrapper
    from torchtitan.tools import utils

    # Without an accelerator upstream falls back to "cuda", and each module keeps a copy of the name.
    utils.device_type = parallel_dims.device_type = "cpu"
    # DTensor has no sharding strategy for the CPU flash kernel.
    ScaledDotProductAttentionWrapper.sdpa_backends = [SDPBackend.MATH]
    torch.histc = _counting_integers(torch.histc)


def _counting_integers(histc: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.histc` for the integer expert ids that the router counts; on CPU it takes floats only."""

    @wraps(histc)
    def counted(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return histc(ids.float(), *args, **kwargs).to(ids.dtype)

    return counted
