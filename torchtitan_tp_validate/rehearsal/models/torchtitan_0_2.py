"""The torchtitan 0.2.x families at debug size: same code path as a real run, a few hundred kilobytes.

Every family comes from the train spec that torchtitan's own Trainer would ask for, and keeps its
registered debug flavor but for the sizes. Every size that the caller does not name divides by every
degree that the tests use, so that the named ones alone decide the outcome.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, wraps
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.rehearsal.models import TinyModel, sum_gradients_without_nccl

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES = ("llama3", "llama4", "qwen3", "qwen3_moe")
# gpt_oss came with 0.2.1.
MORE_FAMILIES = tuple(name for name in ("deepseek_v3", "gpt_oss") if find_spec(f"torchtitan.models.{name}"))
SHARED_KV_HEADS = FAMILIES
HAS_HEAD_CHECK = False
FUSED_QKV = ()

SEQ_LEN = 32
VOCAB_SIZE = 256
HEAD_DIM = 16
DIM = 64
NUM_EXPERTS = 8

_ANY = ("vocab", "seq_len", "dim")
_ROUTED = ("expert_hidden", "num_experts")
SIZES: dict[str, tuple[str, ...]] = {
    "llama3": ("hidden", *_ANY),
    "llama4": ("hidden", "shared_hidden", *_ROUTED, *_ANY),
    "qwen3": ("hidden", *_ANY),
    "qwen3_moe": (*_ROUTED, *_ANY),
    "deepseek_v3": ("hidden", "shared_hidden", *_ROUTED, "q_lora", "kv_lora", "v_head_dim", *_ANY),
    "gpt_oss": (*_ROUTED, *_ANY),
}
"""The sizes that `build` understands, by family."""
BACKENDS = dict.fromkeys(SIZES, (None,))
STRIDE = 1

_ARGUMENTS = {
    "vocab": "vocab_size",
    "dim": "dim",
    "q_lora": "q_lora_rank",
    "kv_lora": "kv_lora_rank",
    "v_head_dim": "v_head_dim",
}
"""Sizes that every family with them calls the same."""

_NAMES = {"qwen3_moe": "qwen3"}
_FLAVORS = {"qwen3_moe": "debugmodel_moe"}
_FUNCTIONS = {
    "llama3": "parallelize_llama",
    "llama4": "parallelize_llama",
    "qwen3": "parallelize_qwen3",
    "deepseek_v3": "parallelize_deepseekv3",
    "gpt_oss": "parallelize_gptoss",
}
_NO_SIZES: Mapping[str, int] = MappingProxyType({})

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
    atexit.register(_until_exit.close)
    if device_type == "cpu":
        stand_in_for_gpu_kernels()


def build(
    family: str,
    *,
    n_heads: int,
    n_kv_heads: int,
    tp: int,
    ep: int = 1,
    etp: int = 1,
    upstream_check: bool = True,
    sizes: Mapping[str, int] = _NO_SIZES,
    spmd_backend: str | None = None,
    replicate_kv_heads: bool = False,
    sequence_parallel: bool = True,
) -> TinyModel:
    """Return a tiny model with these head counts and sizes, configured for a run at these degrees.

    0.2.x has no head check of its own to take out of the way, and DTensor as its only backend.
    deepseek_v3 has no KV heads: its `n_kv_heads` is not looked at. The guard brings KV-head replication
    in, `replicate_kv_heads` does nothing. Sequence parallel cannot be switched off.

    Raises:
        ValueError: the family, or one of the sizes, is not there.
    """
    del upstream_check, replicate_kv_heads
    if not sequence_parallel:
        raise ValueError("torchtitan 0.2.x is always sequence parallel")
    _refuse_unknown(family, sizes, spmd_backend)

    import torch
    from torchtitan.protocols.train_spec import get_train_spec

    name = _NAMES.get(family, family)
    spec = get_train_spec(name)
    flavor = _FLAVORS.get(family, "debugmodel")
    seq_len = sizes.get("seq_len", SEQ_LEN)
    job_config = partial(_job_config, name, flavor, ep=ep, etp=etp, seq_len=seq_len)
    model_args = _tiny(family, spec.model_args[flavor], n_heads, n_kv_heads, sizes)
    model_args.update_from_config(job_config(tp=tp))
    with torch.device("meta"):
        model = spec.model_cls(model_args)
        _resize(family, model, sizes)

    return TinyModel(
        model=model,
        parallelize_fn=spec.parallelize_fn,
        entry_point=(f"torchtitan.models.{name}.infra.parallelize", _FUNCTIONS[name]),
        wrapper=name,
        make_parallel_dims=partial(_parallel_dims, ep=ep, etp=etp),
        arguments=lambda dims: ((dims, job_config(tp=dims.tp)), {}),
        initialize=_initialize,
        loss=partial(_loss, tp=tp),
        vocab_size=model_args.vocab_size,
        seq_len=seq_len,
        hf_adapter=lambda: spec.state_dict_adapter(model_args, None),
    )


def replicate_kv_heads(model: nn.Module, tp: int) -> None:
    """Let ranks share the KV heads of a model that has been built, without any check of ours."""
    from torchtitan_tp_validate.kv_replication import torchtitan_0_2

    torchtitan_0_2.replicate_kv_heads(model, tp)


def _refuse_unknown(family: str, sizes: Mapping[str, int], spmd_backend: str | None) -> None:
    known = FAMILIES + MORE_FAMILIES
    if family not in known:
        raise ValueError(f"unknown family {family!r}; this torchtitan 0.2.x has {', '.join(known)}")
    if unknown := sizes.keys() - set(SIZES[family]):
        raise ValueError(f"{family} has no {', '.join(sorted(unknown))}; it has {', '.join(SIZES[family])}")
    if spmd_backend is not None:
        raise ValueError(f"torchtitan 0.2.x has no spmd backend to choose, got {spmd_backend!r}")


def _tiny(family: str, args: Any, n_heads: int, n_kv_heads: int, sizes: Mapping[str, int]) -> Any:
    fields: dict[str, Any] = {"n_layers": 2, "n_heads": n_heads, "vocab_size": VOCAB_SIZE}
    if family != "deepseek_v3":
        fields["n_kv_heads"] = n_kv_heads
    fields |= _dimensions(family, n_heads, sizes)
    if family in ("llama4", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        fields["moe_args"] = replace(
            args.moe_args,
            num_experts=sizes.get("num_experts", NUM_EXPERTS),
            top_k=2,
            # The grouped kernel rounds to bfloat16.
            use_grouped_mm=False,
        )
    fields |= {_ARGUMENTS[key]: size for key, size in sizes.items() if key in _ARGUMENTS}
    return replace(args, **fields)


def _dimensions(family: str, n_heads: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the family's own sizes, as far as its model args can say them; `_resize` does the rest."""
    if family.startswith("qwen3"):
        return {
            "dim": DIM,
            "head_dim": HEAD_DIM,
            "hidden_dim": sizes.get("hidden", 128),
            "moe_inter_dim": sizes.get("expert_hidden", 64),
        }
    if family == "gpt_oss":
        return {"dim": DIM, "head_dim": HEAD_DIM, "moe_inter_dim": sizes.get("expert_hidden", 64)}
    if family == "deepseek_v3":
        # Two shared experts, as in the flavor: their hidden size is twice moe_inter_dim.
        return {
            "dim": DIM,
            "inter_dim": sizes.get("hidden", 128),
            "moe_inter_dim": 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": HEAD_DIM,
            "qk_rope_head_dim": 8,
            "v_head_dim": HEAD_DIM,
        }
    # head_dim is dim // n_heads here; multiple_of rounds the feed-forward up to a multiple of 64.
    dimensions: dict[str, Any] = {"dim": HEAD_DIM * n_heads, "multiple_of": 64}
    if family == "llama3" and "hidden" in sizes:
        # A formula of dim gives the hidden size: scaled to almost nothing, it is rounded up to this.
        dimensions |= {"multiple_of": sizes["hidden"], "ffn_dim_multiplier": 0.01}
    return dimensions


def _resize(family: str, model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Replace the projections whose size the model args can only give together with others.

    llama4 has one formula for its dense, shared and routed hidden sizes, deepseek_v3 one number for the
    last two.
    """
    if family not in ("llama4", "deepseek_v3"):
        return
    for block in model.layers.values():
        if not block.moe_enabled:
            _resize_feed_forward(block.feed_forward, sizes.get("hidden"))
        else:
            _resize_feed_forward(block.moe.shared_experts, sizes.get("shared_hidden"))
            _resize_experts(block.moe.experts, sizes.get("expert_hidden"))


def _resize_feed_forward(module: nn.Module, hidden: int | None) -> None:
    from torch import nn

    if hidden is not None:
        dim = module.w1.in_features
        module.w1, module.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        module.w2 = nn.Linear(hidden, dim, bias=False)


def _resize_experts(module: nn.Module, hidden: int | None) -> None:
    import torch
    from torch import nn

    if hidden is not None:
        experts, _, dim = module.w1.shape
        module.w1, module.w3 = (nn.Parameter(torch.empty(experts, hidden, dim)) for _ in range(2))
        module.w2 = nn.Parameter(torch.empty(experts, dim, hidden))


def _job_config(name: str, flavor: str, *, tp: int, ep: int, etp: int, seq_len: int) -> Any:
    from torchtitan.config import JobConfig

    config = JobConfig()
    config.model.name = name
    config.model.flavor = flavor
    config.training.seq_len = seq_len
    config.training.mixed_precision_param = "float32"
    config.parallelism.tensor_parallel_degree = tp
    config.parallelism.expert_parallel_degree = ep
    config.parallelism.expert_tensor_parallel_degree = etp
    return config


def _parallel_dims(tp: int, world_size: int, *, ep: int, etp: int) -> Any:
    from torchtitan.distributed import ParallelDims

    fixed = {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "pp": 1}
    return ParallelDims(**fixed, tp=tp, ep=ep, etp=etp, world_size=world_size)


def _initialize(model: nn.Module, device: torch.device) -> None:
    import torch

    model.to_empty(device=device)
    if device.type == "cpu":
        sum_gradients_without_nccl(model)
    with torch.no_grad():
        model.init_weights()


def _loss(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor, *, tp: int) -> torch.Tensor:
    """Return the mean cross entropy of this rank's tokens; gradients are means over all ranks' tokens."""
    from torch.distributed import get_world_size
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.functional import cross_entropy

    logits = model(tokens, **_masks(model, tokens))
    mean = cross_entropy(logits.flatten(0, 1), labels.flatten())
    if not isinstance(model, FSDPModule):
        return mean
    # torchtitan 0.2.2 has data parallelism sum gradients over its ranks, so each owns a share of the mean.
    share = mean / (get_world_size() // tp)
    return share + (mean - share).detach()


def _masks(model: nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
    """Return what the Trainer feeds beside the tokens where attention is flex attention (gpt_oss)."""
    # 0.2.0 has a flag in its place, which is off in the debug flavors.
    if getattr(model.model_args, "attn_type", "sdpa") != "flex":
        return {}
    return {"attention_masks": model.get_attention_masks(tokens, tokenizer=None)}


def stand_in_for_gpu_kernels() -> None:
    """Let this process run on the CPU: torch in the place of what only a GPU has."""
    import torch
    from torch.nn.attention import SDPBackend
    from torchtitan.distributed import parallel_dims
    from torchtitan.models.attention import FlexAttentionWrapper, ScaledDotProductAttentionWrapper
    from torchtitan.models.moe import utils as moe_utils
    from torchtitan.tools import utils

    # Without an accelerator upstream falls back to "cuda", and each module keeps a copy of the name.
    utils.device_type = parallel_dims.device_type = "cpu"
    # DTensor has no sharding strategy for the CPU flash kernel.
    ScaledDotProductAttentionWrapper.sdpa_backends = [SDPBackend.MATH]
    torch.histc = _counting_integers(torch.histc)
    # Without it, a Triton kernel reorders the tokens that expert parallelism has exchanged.
    moe_utils.generate_permute_indices = partial(moe_utils.generate_permute_indices, use_cpu=True)
    # It has no backward on CPU.
    FlexAttentionWrapper.forward = _masked_attention
    if "gpt_oss" in MORE_FAMILIES:
        _run_gpt_oss_on_cpu()


def _run_gpt_oss_on_cpu() -> None:
    from torch.nn.attention.flex_attention import create_block_mask
    from torchtitan.models.gpt_oss.model import model as gpt_oss

    # Compiled, it takes a C++ compiler and a minute.
    gpt_oss.create_attention_mask = partial(create_block_mask, device="cpu")
    # It makes its blocks bfloat16, in which no two degrees would agree.
    gpt_oss.TransformerBlock.to = lambda block, dtype: block


def _masked_attention(
    self: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_mask: Any,
    scale: float | None = None,
    return_lse: bool = False,
    enable_gqa: bool = False,
) -> Any:
    """Return what flex attention computes, its own complaints about heads included."""
    from torch.nn.attention.flex_attention import create_mask

    del self
    heads, kv_heads = q.size(-3), k.size(-3)
    if q.size(-1) != k.size(-1):
        raise ValueError(f"Expect query and key/value to have the same embedding dimension: {q.size(-1)=}")
    if not enable_gqa and heads != kv_heads:
        raise ValueError(f"Expect query and key/value to have the same number of heads but got {heads=}")
    if enable_gqa and heads % kv_heads:
        raise ValueError(f"Expect number of query heads to be a multiple of kv heads but got {heads=}")
    k, v = (tensor.repeat_interleave(heads // kv_heads, dim=-3) for tensor in (k, v))
    mask = create_mask(block_mask.mask_mod, len(q), 1, q.size(-2), k.size(-2), device=q.device)
    scores = (q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)).masked_fill(~mask, float("-inf"))
    out = scores.softmax(-1) @ v
    return (out, scores.logsumexp(-1)) if return_lse else out


def _counting_integers(histc: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.histc` for the integer expert ids that the router counts; on CPU it takes floats only."""

    @wraps(histc)
    def counted(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return histc(ids.float(), *args, **kwargs).to(ids.dtype)

    return counted
