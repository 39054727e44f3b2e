"""The model families of torchtitan 0.3.x and main at debug size, on any of their ``spmd_backend``s.

After ``parallelize_fn`` every parameter that takes part in training is a DTensor, because torchtitan
applies ``fully_shard`` even when data parallelism has degree 1: ``.full_tensor()`` gives the whole
parameter or gradient. The mesh is (``dp_shard``, ``tp``), or (``fsdp``, ``tp``) with partial_dtensor.
The ``TP = 1`` reference is the plain module; it needs no ``parallelize_fn`` (and, on CPU, no process
group).

With spmd_types a parameter whose size the degree does not divide comes out of ``parallelize_fn``
larger than the model config says. `copy_whole` leaves what is too much as torchtitan drew it.

Main has no batch dimension: it is fed one sequence after the other.

On CPU the gated-delta layers see no document boundaries, so they read a batch as one long stream: two
runs compare equal when they are fed the same batch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan_tp_validate.degrees import TOKEN_BUDGET, token_field
from torchtitan_tp_validate.rehearsal.models import TinyModel, sum_gradients_without_nccl
from torchtitan_tp_validate.rehearsal.stand_ins import as_it_is_fed, gated_delta_module
from torchtitan_tp_validate.rehearsal.training import copy_whole
from torchtitan_tp_validate.releases import nearest_line

if TYPE_CHECKING:
    from torchtitan.config import ParallelismConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.protocols.model_spec import ModelSpec

VOCAB_SIZE = 256
SEQ_LEN = 32
HEAD_DIM = 64
HAS_HEAD_CHECK = True

VISION_HEADS = 4
VISION_HIDDEN = 256
PATCH_SIZE = 4
IMAGE_GRID = (1, 4, 4)
"""Frames, rows and columns of patches; both vision encoders merge two by two of them into a token."""
IMAGE_TOKENS = 4

GATED_DELTA_HEADS = 4
"""Key heads, and value heads: every degree up to 4 splits them, so that only n_kv_heads can be wrong."""


SPMD_TYPES, PARTIAL_DTENSOR, FULL_DTENSOR = "spmd_types", "partial_dtensor", "full_dtensor"
DEFAULT_BACKEND = SPMD_TYPES

_ANY = ("dim", "vocab", "seq_len")
_DENSE = (*_ANY, "layer1_kv_heads", "hidden")
_ROUTED = ("expert_hidden", "num_experts")
_GATED_DELTA = ("key_heads", "value_heads")
_VISION = ("vision_heads", "vision_hidden")
_LATENT = (*_ANY, *_ROUTED, "hidden", "shared_hidden", "q_lora", "kv_lora", "v_head_dim")


@dataclass(frozen=True)
class _Family:
    """Where torchtitan keeps a family, and which of its debug layers are enough to test it.

    Attributes:
        package: the package under ``torchtitan.models``.
        flavor: the name that its ``model_registry`` knows.
        layers: the layers of the flavor to keep.
        entry_point: the parallelize function in the package's ``parallelize`` module.
        wrapper: the name of our wrapper module.
        sizes: what ``build`` can set besides the head counts.
        defaults: sizes that differ from the flavor's, to make it quick.
        backends: the values of ``spmd_backend`` that the parallelize function takes.
        images: whether every sequence holds one.
    """

    package: str
    flavor: str
    layers: slice
    entry_point: str
    wrapper: str
    sizes: tuple[str, ...]
    defaults: Mapping[str, int] = field(default_factory=dict)
    backends: tuple[str, ...] = (SPMD_TYPES, PARTIAL_DTENSOR, FULL_DTENSOR)
    images: bool = False


_QWEN3_5 = functools.partial(
    _Family,
    package="qwen3_5",
    # Every fourth layer has full attention: layer 2 is a gated-delta layer, layer 3 is not.
    layers=slice(2, 4),
    entry_point="parallelize_qwen3_5",
    wrapper="qwen3_5_moe",
    backends=(SPMD_TYPES, PARTIAL_DTENSOR),
)
_TWO = slice(0, 2)
_KIMI = functools.partial(
    _Family,
    package="kimi_k2_7",
    flavor="debugmodel",
    layers=_TWO,
    entry_point="parallelize_kimi_k2_5",
    wrapper="kimi_k2_7",
    defaults={"hidden": 256},
    backends=(SPMD_TYPES, PARTIAL_DTENSOR),
)

_FAMILIES = {
    "llama3": _Family("llama3", "debugmodel", _TWO, "parallelize_llama", "llama3", _DENSE),
    "qwen3": _Family("qwen3", "debugmodel_non_fused_qkv", _TWO, "parallelize_qwen3", "qwen3", _DENSE),
    "qwen3_fused": _Family("qwen3", "debugmodel", _TWO, "parallelize_qwen3", "qwen3", _DENSE),
    "qwen3_5": _QWEN3_5(flavor="debugmodel", sizes=(*_DENSE, *_GATED_DELTA)),
    "qwen3_5_moe": _QWEN3_5(
        flavor="debugmodel_moe",
        sizes=(*_ANY, "layer1_kv_heads", *_ROUTED, "shared_hidden", *_GATED_DELTA),
    ),
}

FAMILIES = tuple(_FAMILIES)

_MORE_FAMILIES = {
    "qwen3_moe": _Family(
        *("qwen3", "debugmodel_moe", _TWO, "parallelize_qwen3", "qwen3"),
        sizes=(*_ANY, "layer1_kv_heads", *_ROUTED),
        defaults={"num_experts": 16, "expert_hidden": 128},
    ),
    # One dense layer, one layer with experts.
    "deepseek_v3": _Family(
        *("deepseek_v3", "debugmodel", _TWO, "parallelize_deepseekv3", "deepseek_v3"),
        sizes=_LATENT,
        defaults={"hidden": 256},
    ),
    # One layer with a sliding window, one without.
    "gpt_oss": _Family(
        *("gpt_oss", "debugmodel", _TWO, "parallelize_gptoss", "gpt_oss"),
        sizes=(*_ANY, "layer1_kv_heads", *_ROUTED),
        defaults={"expert_hidden": 128},
    ),
    "kimi_k2_7": _KIMI(sizes=_LATENT),
    "kimi_k2_7_vision": _KIMI(sizes=(*_LATENT, *_VISION), images=True),
    "qwen3_5_vision": _QWEN3_5(flavor="debugmodel", sizes=(*_DENSE, *_GATED_DELTA, *_VISION), images=True),
    "muse_glimmer": _Family(
        *("muse_glimmer", "debugmodel", slice(6, 8), "parallelize_muse_glimmer", "muse_glimmer"),
        sizes=_DENSE,
        backends=(SPMD_TYPES,),
    ),
}

MORE_FAMILIES = tuple(_MORE_FAMILIES)
"""Families that `build` knows besides `FAMILIES`."""
SHARED_KV_HEADS = (*FAMILIES, "qwen3_moe", "gpt_oss", "muse_glimmer")
FUSED_QKV = ("qwen3_fused", "llama3")

_ALL_FAMILIES = _FAMILIES | _MORE_FAMILIES
SIZES = {name: family.sizes for name, family in _ALL_FAMILIES.items()}
"""The keys of ``sizes`` that each family understands."""
STRIDE = 7
"""Of the truth cases that are dealt out to the backends, one in this many is enough: there are 29 pairs of a
family and a backend, and a step that no size's cases repeat in meets all kinds of them."""
_LINE = nearest_line()
_BACKENDS = [backend.name for backend in _LINE.SPMD_BACKENDS] if _LINE else []
BACKENDS = {
    name: tuple(backend for backend in family.backends if backend in _BACKENDS)
    for name, family in _ALL_FAMILIES.items()
}
"""The values of ``spmd_backend`` that each family supports."""


# --- what the device needs -------------------------------------------------------------------------


def prepare(device_type: str) -> None:
    """Set this process up for models on ``device_type``; to be called before the first process group."""
    # torchtitan does the same in init_distributed: its current mesh is thread-local.
    torch.autograd.set_multithreading_enabled(False)
    if device_type == "cpu":
        run_on_cpu()
        _run_flex_attention_without_gpu_kernels()
        _run_gated_delta_without_gpu_kernels()


def run_on_cpu() -> None:
    """Let a model of any batch train on the CPU, but for its attention."""
    _select_cpu()
    _run_experts_without_gpu_kernels()
    _exchange_tokens_without_nccl()


def _select_cpu() -> None:
    """Make torchtitan build its meshes on CPU; without an accelerator it assumes CUDA."""
    import torchtitan.distributed.parallel_dims
    import torchtitan.tools.utils

    torchtitan.tools.utils.device_type = "cpu"
    torchtitan.distributed.parallel_dims.device_type = "cpu"


def _on_cpu() -> bool:
    """Whether `prepare` chose the CPU."""
    from torchtitan.tools import utils

    return bool(utils.device_type == "cpu")


def _is_main() -> bool:
    """Whether this is torchtitan's main, and not 0.3.x."""
    return hasattr(import_module("torchtitan.config").TrainingConfig, TOKEN_BUDGET)


def _run_experts_without_gpu_kernels() -> None:
    """Let routed experts multiply in fp32, one expert after the other."""
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    for experts in (GroupedExperts, GptOssGroupedExperts):
        if not hasattr(experts.forward, "__wrapped__"):
            experts.forward = _without_bfloat16(experts.forward)
    GroupedExperts._grouped_mm = lambda self, *, A, B_t, offs: _multiply_by_expert(A, B_t, offs)


def _without_bfloat16(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return this forward, its casts to bf16 left out: in bf16 no two degrees would agree."""
    source = textwrap.dedent(inspect.getsource(forward)).replace(".bfloat16()", "")
    made: dict[str, Callable[..., torch.Tensor]] = {}
    # Not by a patch while it runs, which torch.compile could not look through.
    exec(source, forward.__globals__, made)
    return functools.wraps(forward)(made[forward.__name__])


@torch.library.custom_op("tp_validate::multiply_by_expert", mutates_args=())  # type: ignore[untyped-decorator]
def _multiply_by_expert(A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return the rows of each expert times its own matrix; to torch.compile an operator of torch."""
    parts = A.split(_sizes(offs))
    return torch.cat([rows @ weight for rows, weight in zip(parts, B_t, strict=True)])


@torch.library.custom_op("tp_validate::multiply_by_rows", mutates_args=())  # type: ignore[untyped-decorator]
def _multiply_by_rows(A: torch.Tensor, out: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return, for each expert, its rows of A, transposed, times those of ``out``."""
    pairs = zip(A.split(_sizes(offs)), out.split(_sizes(offs)), strict=True)
    return torch.stack([rows.T @ made for rows, made in pairs])


def _sizes(offs: torch.Tensor) -> list[int]:
    sizes: list[int] = torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
    return sizes


def _expert_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    A, B_t, offs = ctx.saved_tensors
    to_rows = _multiply_by_expert(gradient, B_t.transpose(-2, -1), offs)
    return to_rows, _multiply_by_rows(A, gradient, offs), None


_multiply_by_expert.register_fake(lambda A, B_t, offs: A.new_empty(A.shape[0], B_t.shape[-1]))
_multiply_by_rows.register_fake(lambda A, out, offs: A.new_empty(offs.shape[0], A.shape[-1], out.shape[-1]))
_multiply_by_expert.register_autograd(
    _expert_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def _run_flex_attention_without_gpu_kernels() -> None:
    """Let flex attention work by plain products; it has no backward on CPU.

    Only the attention of gpt_oss, which needs the log of the sum of the weights, and of vision encoders
    keeps it there. Windows are left out, as they are longer than `SEQ_LEN`; images fill their rows.
    """
    import torchtitan.models.kimi_k2_7.vision_encoder as kimi
    import torchtitan.models.qwen3_5.vision_encoder as qwen3_5
    from torchtitan.models.common.attention import FlexAttention

    FlexAttention.forward = as_it_is_fed(FlexAttention, _attend)
    qwen3_5.compiled_create_block_mask = kimi.compiled_create_block_mask = _see_everything


def _see_everything(*_: Any, **__: Any) -> str:
    """In the place of a block mask: what `_attend` takes for no mask at all."""
    return "everything"


def _attend(
    self: nn.Module,
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    *,
    attention_masks: str | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    **_: Any,
) -> torch.Tensor:
    """Flex attention's forward, with its demands on the head counts; causal unless told otherwise."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
    if q.shape[1] % k.shape[1] or (q.shape[1] != k.shape[1] and not enable_gqa):
        raise ValueError(f"query heads {q.shape[1]} do not fit key and value heads {k.shape[1]}")
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attention_masks is None:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    if out_transform is None:
        return out
    return out_transform(out, scores.logsumexp(-1).transpose(1, 2))


def _run_gated_delta_without_gpu_kernels() -> None:
    """Put transformers' pure-torch gated delta rule in the place of fla's Triton kernel."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as transformers_qwen3_5

    # Unwrapped, because the decorator would send the call back to fla.
    kernel = inspect.unwrap(transformers_qwen3_5.torch_chunk_gated_delta_rule)
    gated_delta_module()._fla_chunk_gated_delta_rule = kernel


def _exchange_tokens_without_nccl() -> None:
    """Let expert parallelism exchange different numbers of tokens: gloo can in one tensor, not in a list."""
    torch.distributed.all_to_all = _exchange


def _exchange(received: list[torch.Tensor], sent: list[torch.Tensor], group: Any = None) -> None:
    """`torch.distributed.all_to_all`."""
    together = torch.cat(received)
    sizes, sent_sizes = [len(part) for part in received], [len(part) for part in sent]
    torch.distributed.all_to_all_single(together, torch.cat(sent), sizes, sent_sizes, group=group)
    for part, values in zip(received, together.split(sizes), strict=True):
        part.copy_(values)


# --- the configuration -----------------------------------------------------------------------------


def _tiny_spec(family: _Family, n_heads: int, n_kv_heads: int, sizes: Mapping[str, int]) -> ModelSpec:
    """Return the registry's spec of this family, its model config cut down and given these sizes."""
    registry = import_module(f"torchtitan.models.{family.package}").model_registry
    spec = registry(family.flavor, attn_backend="flex")
    config = spec.model
    config.layers = config.layers[family.layers]
    if "layer1_kv_heads" in sizes:
        _add_second_full_attention(config)
    if "dim" in sizes:
        _set_dim(config, sizes["dim"])
    _set_vocab_size(config, sizes.get("vocab", VOCAB_SIZE))
    for layer in config.layers:
        if layer.attention is not None:
            layer.attention = _attention_with_sizes(layer.attention, n_heads, n_kv_heads, sizes)
        if getattr(layer, "delta_net", None) is not None:
            _set_gated_delta_heads(layer.delta_net, sizes)
        _set_feed_forward_sizes(layer, sizes)
    if "layer1_kv_heads" in sizes:
        second = _full_attention_layers(config)[1]
        second.attention = _attention_with_sizes(second.attention, n_heads, sizes["layer1_kv_heads"], sizes)
    if hasattr(config.norm, "gain_center"):
        # muse_glimmer starts from logits of zero, which tell nothing and leave most gradients at zero.
        config.norm.param_init = {"weight": nn.init.ones_}
    if getattr(config, "vision_encoder", None) is not None:
        config.vision_encoder = _vision_encoder(family, config, sizes)
    return spec


def _vision_encoder(family: _Family, config: Any, sizes: Mapping[str, int]) -> Any:
    """Return a vision encoder of one layer, built anew: its width follows from its heads."""
    package = import_module(f"torchtitan.models.{family.package}")
    heads = sizes.get("vision_heads", VISION_HEADS)
    shape = {
        "dim": heads * HEAD_DIM,
        "ffn_dim": sizes.get("vision_hidden", VISION_HIDDEN),
        "num_layers": 1,
        "num_heads": heads,
        "patch_size": PATCH_SIZE,
    }
    if family.package == "kimi_k2_7":
        places = {"init_pos_emb_height": 8, "init_pos_emb_width": 8}
        return package._vision_encoder_config(**shape, **places, text_hidden_size=config.dim)
    merge = {"temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 64}
    return package._qwen35_vision_encoder_config(**shape, **merge, out_hidden_size=config.dim)


def _full_attention_layers(config: Any) -> list[Any]:
    """Return the layers that have attention with key and value heads."""
    return [layer for layer in config.layers if layer.attention is not None]


def _add_second_full_attention(config: Any) -> None:
    """Repeat the layer with full attention if there is no second one."""
    layers = _full_attention_layers(config)
    if len(layers) < 2:
        config.layers = [*config.layers, copy.deepcopy(layers[-1])]


_READ_DIM = {"wq", "wk", "wv", "wkv", "wqkv", "wq_a", "wkv_a", "o_gate", "w1", "w3", "gate"}
_READ_DIM |= {f"in_proj_{name}" for name in "qkvzab"}
_WRITE_DIM = {"w2", "wo", "out_proj"}
_NORM_DIM = {"attention_norm", "ffn_norm", "post_attention_norm", "post_ffn_norm"}
_CARRY_DIM = {"attention", "inner_experts"}


def _set_dim(config: Any, dim: int) -> None:
    """Give the residual stream this width, through the whole decoder and what feeds it."""
    for layer in config.layers:
        for name, part in _parts(layer):
            if name in _READ_DIM:
                part.in_features = dim
            elif name in _WRITE_DIM:
                part.out_features = dim
            elif name in _NORM_DIM:
                _set_norm_width(part, dim)
            elif name in _CARRY_DIM and hasattr(part, "dim"):
                part.dim = dim
    config.dim = dim
    config.lm_head.in_features = dim
    _set_norm_width(config.norm, dim)
    _token_embeddings(config).embedding_dim = dim
    if hasattr(config.tok_embeddings, "norm"):
        _set_norm_width(config.tok_embeddings.norm, dim)


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """Every config below this one, with the name of its field."""
    for described in dataclasses.fields(config):
        part = getattr(config, described.name, None)
        if dataclasses.is_dataclass(part):
            yield described.name, part
            yield from _parts(part)


def _set_norm_width(norm: Any, width: int) -> None:
    """Set the width of a norm, whatever its config calls it."""
    setattr(norm, "normalized_shape" if hasattr(norm, "normalized_shape") else "dim", width)


def _token_embeddings(config: Any) -> Any:
    """Return the config of the token embedding; muse_glimmer bundles it with a norm."""
    return getattr(config.tok_embeddings, "embedding", config.tok_embeddings)


def _set_vocab_size(config: Any, vocab_size: int) -> None:
    """Give the model this many tokens."""
    config.vocab_size = vocab_size
    _token_embeddings(config).num_embeddings = vocab_size
    config.lm_head.out_features = vocab_size


def _set_feed_forward_sizes(layer: Any, sizes: Mapping[str, int]) -> None:
    """Set the hidden sizes and the number of experts of one layer, where it has them."""
    moe = getattr(layer, "moe", None)
    if layer.feed_forward is not None:
        _set_hidden(layer.feed_forward, sizes.get("hidden"))
    if moe is None:
        return
    if moe.shared_experts is not None:
        _set_hidden(moe.shared_experts, sizes.get("shared_hidden"))
    experts = moe.routed_experts.inner_experts
    experts.hidden_dim = sizes.get("expert_hidden", experts.hidden_dim)
    if "num_experts" in sizes:
        _set_number_of_experts(moe, sizes["num_experts"])


def _set_hidden(feed_forward: Any, hidden: int | None) -> None:
    """Give a feed-forward this hidden size."""
    if hidden is not None:
        feed_forward.w1.out_features = feed_forward.w3.out_features = hidden
        feed_forward.w2.in_features = hidden


def _set_number_of_experts(moe: Any, num_experts: int) -> None:
    """Give a layer this many routed experts."""
    routed = moe.routed_experts
    for part in (moe, moe.router, routed.inner_experts, routed.token_dispatcher):
        part.num_experts = num_experts
    moe.router.gate.out_features = num_experts
    moe.router.top_k = routed.token_dispatcher.top_k = min(moe.router.top_k, num_experts)


def _attention_with_sizes(attention: Any, n_heads: int, n_kv_heads: int, sizes: Mapping[str, int]) -> Any:
    """Return the same attention with these head counts, on a kernel that the device has."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.deepseek_v3.model import Attention as LatentAttention
    from torchtitan.models.gpt_oss.model import Attention as SinkAttention

    is_sink = isinstance(attention, SinkAttention.Config)
    if _on_cpu() and not is_sink and not _is_main():
        # Flex attention has no backward on CPU.
        attention.inner_attention = ScaledDotProductAttention.Config()
    longest = "max_context_length" if _is_main() else "max_seq_len"
    attention.rope = dataclasses.replace(attention.rope, **{longest: sizes.get("seq_len", SEQ_LEN)})
    if isinstance(attention, LatentAttention.Config):
        return _latent_attention_with_sizes(attention, n_heads, sizes)
    return with_heads(attention, n_heads, n_kv_heads)


def with_heads(attention: Any, n_heads: int, n_kv_heads: int) -> Any:
    """Return a config of attention with key-value heads, of so many heads."""
    from torchtitan.models.common.attention import GQAttention
    from torchtitan.models.gpt_oss.model import Attention as SinkAttention

    if type(attention) is GQAttention.Config:
        return _gqa_with_heads(attention, n_heads, n_kv_heads)
    if isinstance(attention, (SinkAttention.Config, GQAttention.Config)):
        return _extended_gqa_with_heads(attention, n_heads, n_kv_heads)
    return _gated_attention_with_heads(attention, n_heads, n_kv_heads)


def _gqa_with_heads(attention: Any, n_heads: int, n_kv_heads: int) -> Any:
    """llama3 and qwen3: built anew, since a fused projection's initializer knows the head counts."""
    from torchtitan.models.common.attention import FusedQKVLinear
    from torchtitan.models.common.config_utils import make_gqa_config

    qk_norm = attention.qk_norm
    return make_gqa_config(
        dim=attention.dim,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=HEAD_DIM,
        wqkv_param_init={"weight": functools.partial(nn.init.normal_, std=0.02)},
        wo_param_init=attention.wo.param_init,
        inner_attention=attention.inner_attention,
        rope=dataclasses.replace(attention.rope, dim=HEAD_DIM),
        fuse_qkv=isinstance(attention.qkv_linear, FusedQKVLinear.Config),
        qk_norm=qk_norm and dataclasses.replace(qk_norm, normalized_shape=HEAD_DIM),
    )


def _extended_gqa_with_heads(attention: Any, n_heads: int, n_kv_heads: int) -> Any:
    """gpt_oss and muse_glimmer: they add to the common attention, and their debug heads are small."""
    from torchtitan.models.common.attention import FusedQKVLinear

    resize = dataclasses.replace
    width, kv_width = n_heads * attention.head_dim, n_kv_heads * attention.head_dim
    qkv = attention.qkv_linear
    if isinstance(qkv, FusedQKVLinear.Config):
        wqkv = resize(qkv.wqkv, out_features=width + 2 * kv_width)
        qkv = resize(qkv, n_heads=n_heads, n_kv_heads=n_kv_heads, wqkv=wqkv)
    else:
        wq, wkv = resize(qkv.wq, out_features=width), resize(qkv.wkv, out_features=kv_width)
        qkv = resize(qkv, wq=wq, wkv=wkv)
    wo = resize(attention.wo, in_features=width)
    attention = resize(attention, n_heads=n_heads, n_kv_heads=n_kv_heads, qkv_linear=qkv, wo=wo)
    if hasattr(attention, "o_gate"):
        attention.o_gate = resize(attention.o_gate, out_features=width)
        # Stock attention is so sharp that gradients in fp32 agree to few digits only.
        attention.scale_query_by = 1.0
    return attention


def _gated_attention_with_heads(attention: Any, n_heads: int, n_kv_heads: int) -> Any:
    """qwen3_5: wq carries a gate besides the query, and RoPE turns only part of a head."""
    resize = dataclasses.replace
    return resize(
        attention,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=HEAD_DIM,
        wq=resize(attention.wq, out_features=n_heads * HEAD_DIM * 2),
        wk=resize(attention.wk, out_features=n_kv_heads * HEAD_DIM),
        wv=resize(attention.wv, out_features=n_kv_heads * HEAD_DIM),
        wo=resize(attention.wo, in_features=n_heads * HEAD_DIM),
        q_norm=resize(attention.q_norm, dim=HEAD_DIM),
        k_norm=resize(attention.k_norm, dim=HEAD_DIM),
    )


def _latent_attention_with_sizes(attention: Any, n_heads: int, sizes: Mapping[str, int]) -> Any:
    """deepseek_v3 and kimi_k2_7: no key and value heads of their own; a query rank only if asked for."""
    resize = dataclasses.replace
    q_width = n_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    kv_lora = sizes.get("kv_lora", attention.kv_lora_rank)
    q_lora = sizes.get("q_lora", attention.q_lora_rank)
    v_head_dim = sizes.get("v_head_dim", attention.v_head_dim)
    kv_width = n_heads * (attention.qk_nope_head_dim + v_head_dim)
    wkv_a = resize(attention.wkv_a, out_features=kv_lora + attention.qk_rope_head_dim)
    resized = resize(
        attention,
        n_heads=n_heads,
        q_lora_rank=q_lora,
        kv_lora_rank=kv_lora,
        v_head_dim=v_head_dim,
        wq=resize(attention.wq, out_features=q_width),
        wkv_a=wkv_a,
        wkv_b=resize(attention.wkv_b, in_features=kv_lora, out_features=kv_width),
        kv_norm=resize(attention.kv_norm, normalized_shape=kv_lora),
        wo=resize(attention.wo, in_features=n_heads * v_head_dim),
    )
    if not q_lora:
        return resized
    return resize(
        resized,
        wq=None,
        wq_a=resize(resized.wq, out_features=q_lora),
        wq_b=resize(resized.wq, in_features=q_lora),
        q_norm=resize(attention.q_norm, normalized_shape=q_lora),
    )


def _set_gated_delta_heads(delta_net: Any, sizes: Mapping[str, int]) -> None:
    """Give a gated-delta layer its key and value heads, `GATED_DELTA_HEADS` unless told otherwise."""
    key_heads = sizes.get("key_heads", GATED_DELTA_HEADS)
    value_heads = sizes.get("value_heads", GATED_DELTA_HEADS)
    key_width = key_heads * delta_net.key_head_dim
    value_width = value_heads * delta_net.value_head_dim
    outputs = {"q": key_width, "k": key_width, "v": value_width, "z": value_width}
    outputs |= {"a": value_heads, "b": value_heads}
    for name, width in outputs.items():
        projection = getattr(delta_net, f"in_proj_{name}")
        setattr(delta_net, f"in_proj_{name}", dataclasses.replace(projection, out_features=width))
    for name in ("q", "k", "v"):
        width = outputs[name]
        convolution = getattr(delta_net, f"conv_{name}")
        resized = dataclasses.replace(convolution, in_channels=width, out_channels=width, groups=width)
        setattr(delta_net, f"conv_{name}", resized)
    delta_net.out_proj = dataclasses.replace(delta_net.out_proj, in_features=value_width)
    # Stock draws decays up to 16 per token: summed over a batch that leaves so few digits in fp32 that
    # gradients of one layout and another could only be compared roughly.
    slow_decay = functools.partial(nn.init.uniform_, a=-4.0, b=-2.0)
    delta_net.param_init = {**delta_net.param_init, "A_log": slow_decay}


def _update_for_tensor_parallel(config: Any, parallelism: ParallelismConfig, upstream_check: bool) -> None:
    """Let the model config see the run's parallelism, as the Trainer does before it builds.

    Upstream's head checks run when the degree is above 1, while the sharding that this call also sets
    up is the same at every degree: told 1, it does everything but check.
    """
    if not upstream_check:
        parallelism = dataclasses.replace(parallelism, tensor_parallel_degree=1)
    config.update_from_config(config=SimpleNamespace(parallelism=parallelism))


# --- training --------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One model's life from configuration to loss.

    Attributes:
        config: the model config, already updated for the run.
        backend: torchtitan keeps the ``spmd_backend`` in a global, which other models of this process
            may have set since.
        seq_len: of the sequences that it will be fed.
        images: whether each of them holds an image.
        ep: the expert parallel degree that the config was updated for.
        parallel_dims: what the model was parallelized over; None while it is the plain module.
    """

    config: Any
    backend: str
    seq_len: int
    images: bool
    ep: int
    sequence_parallel: bool = True
    parallel_dims: ParallelDims | None = None

    def select_backend(self) -> None:
        """Make this run's backend the process's."""
        from torchtitan.distributed.utils import set_spmd_backend

        # With spmd_types the models name mesh axes, which the plain module does not have.
        set_spmd_backend(PARTIAL_DTENSOR if self.parallel_dims is None else self.backend)

    def make_parallel_dims(self, tp: int, world_size: int) -> ParallelDims:
        """Tensor parallelism of degree ``tp``; the ranks that are left shard the data."""
        from torchtitan.distributed import ParallelDims

        return ParallelDims.from_config(self.parallelism(tp), world_size)

    def parallelism(self, tp: int) -> ParallelismConfig:
        """Return the part of the training config that says how the model is split."""
        return dataclasses.replace(
            _parallelism(tp, self.ep, self.backend), enable_sequence_parallel=self.sequence_parallel
        )

    def arguments(self, parallel_dims: ParallelDims) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what follows the model in a call of the parallelize function."""
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache
        from torchtitan.config import CompileConfig, TrainingConfig

        self.parallel_dims = parallel_dims
        self.select_backend()
        # It would hand out an earlier model's mesh, equal but not the same, which fully_shard refuses.
        _clear_sharding_prop_cache()
        return (), {
            "parallel_dims": parallel_dims,
            "training": TrainingConfig(mixed_precision_param="float32", **{token_field(): self.seq_len}),
            "parallelism": self.parallelism(parallel_dims.tp),
            "compile_config": CompileConfig(enable=False),
            "ac_config": None,
            "dump_folder": "",
        }

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def initialize(self, model: nn.Module, device: torch.device) -> None:
        """Materialise the model and draw its weights; those of one process whole, as if built on the CPU."""
        self.select_backend()
        if _on_cpu():
            sum_gradients_without_nccl(model)
        drawn: dict[str, nn.Parameter] = {}
        if self.parallel_dims is None:
            whole = self.config.build()
            whole.init_states(buffer_device=None)
            drawn = dict(whole.named_parameters())
        model.to_empty(device=device)
        model.init_states(buffer_device=None)
        for name, weight in drawn.items():
            copy_whole(model.get_parameter(name), weight)

    def loss(self, model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of this rank's tokens; gradients are means over all ranks' tokens."""
        from torchtitan.components.loss import cross_entropy_loss

        self.select_backend()
        arguments = self._model_arguments(model, tokens)
        if self.images:
            tokens, image_arguments = self._with_images(tokens)
            arguments |= image_arguments
        count = labels.numel()
        dims = self.parallel_dims
        dp = dims.dp_shard * dims.dp_replicate if dims else 1
        with self._current_mesh():
            tokens, labels, arguments = self._inputs(tokens, labels, arguments)
            if _is_main():
                logits = torch.cat([model(row, **of_one) for row, of_one in _rows(tokens, arguments)])
                labels = labels.flatten()
            else:
                logits = model(tokens, **arguments)
            total = cross_entropy_loss(logits, labels, global_vocab_size=self.config.vocab_size)
        if isinstance(total, DTensor):
            # Already a sum over all ranks' tokens.
            return total / (count * dp)
        mean = total / count
        # Data parallelism sums gradients over its ranks, so each rank owns a share of the mean.
        share = mean / dp
        return share + (mean - share).detach()

    def _inputs(
        self, tokens: torch.Tensor, labels: torch.Tensor, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return the inputs as the backend wants them, as the Trainer prepares them."""
        if self.backend == FULL_DTENSOR and self.parallel_dims is not None:
            from torchtitan.distributed.full_dtensor import parallelize_inputs

            tokens, labels, arguments = parallelize_inputs(self.parallel_dims, tokens, labels, arguments)
        return tokens, labels, arguments

    def _current_mesh(self) -> AbstractContextManager[None]:
        """Return the mesh that torchtitan's collectives and annotations read from the context."""
        from torchtitan.distributed.utils import get_spmd_context

        if self.parallel_dims is None:
            return nullcontext()
        context: AbstractContextManager[None] = get_spmd_context(parallel_dims=self.parallel_dims)()
        return context

    def _model_arguments(self, model: nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
        """Return what the Trainer would feed beside the tokens."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
        arguments: dict[str, Any] = {"positions": positions}
        if not _on_cpu():
            arguments["attention_masks"] = model.get_attention_masks(positions)
        if hasattr(self.config, "vision_encoder"):
            # Ids that no token has: text only.
            arguments["special_tokens"] = {"image_id": -1, "video_id": -2}
        return arguments

    def _with_images(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the sequences, an image in each after two tokens, and what the model wants besides."""
        placeholder = self.config.vocab_size - 1
        tokens = torch.where(tokens == placeholder, 0, tokens)
        tokens[:, 2 : 2 + IMAGE_TOKENS] = placeholder
        width = self.config.vision_encoder.patch_embed_proj.in_features
        shape = (tokens.shape[0], math.prod(IMAGE_GRID), width)
        patches = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return tokens, {
            "pixel_values": patches.to(tokens.device),
            "grid_thw": torch.tensor([IMAGE_GRID] * tokens.shape[0], device=tokens.device),
            "special_tokens": {"image_id": placeholder, "video_id": placeholder},
        }


def _rows(
    tokens: torch.Tensor, arguments: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield each sequence of a batch, and what of the other arguments is its own."""
    for index, row in enumerate(tokens):
        yield (
            row,
            {
                name: value[index] if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            },
        )


def _parallelism(tp: int, ep: int, backend: str) -> ParallelismConfig:
    """Return the part of the training config that says how a model is split."""
    from torchtitan.config import ParallelismConfig

    return ParallelismConfig(tensor_parallel_degree=tp, expert_parallel_degree=ep, spmd_backend=backend)


def replicate_kv_heads(model: nn.Module, tp: int) -> None:
    """Do nothing: the config that the model was built from has been converted."""


def build(
    family: str,
    *,
    n_heads: int,
    n_kv_heads: int,
    tp: int,
    ep: int = 1,
    upstream_check: bool = True,
    sizes: Mapping[str, int] = MappingProxyType({}),
    spmd_backend: str | None = None,
    replicate_kv_heads: bool = False,
    sequence_parallel: bool = True,
    converters: Sequence[Any] = (),
) -> TinyModel:
    """Return a tiny model of this family, configured for a run at these degrees.

    Its config goes through the ``converters``, and, with ``replicate_kv_heads``, through ours.

    Raises:
        ValueError: if the family has no such size (see `SIZES`), and from torchtitan's own head check,
            unless ``upstream_check`` is off.
    """
    from torchtitan.distributed.utils import set_spmd_backend

    described = _ALL_FAMILIES[family]
    if unknown := sizes.keys() - set(described.sizes):
        raise ValueError(f"{family} has no {', '.join(sorted(unknown))}")
    sizes = {**described.defaults, **sizes}
    spec = _tiny_spec(described, n_heads, n_kv_heads, sizes)
    seq_len = sizes.get("seq_len", SEQ_LEN)
    for converter in converters:
        spec.model = converter.convert(spec.model)
    if replicate_kv_heads:
        from torchtitan_tp_validate.kv_replication import ReplicateKVHeads

        spec.model = ReplicateKVHeads.Config().build().convert(spec.model)
    run = _Run(spec.model, spmd_backend or DEFAULT_BACKEND, seq_len, described.images, ep, sequence_parallel)
    set_spmd_backend(run.backend)
    _update_for_tensor_parallel(spec.model, run.parallelism(tp), upstream_check)
    with torch.device("meta"):
        model = spec.model.build()
    parallelize_fn: Callable[..., nn.Module] = spec.parallelize_fn
    return TinyModel(
        model=model,
        parallelize_fn=parallelize_fn,
        entry_point=(f"torchtitan.models.{described.package}.parallelize", described.entry_point),
        wrapper=described.wrapper,
        make_parallel_dims=run.make_parallel_dims,
        arguments=run.arguments,
        initialize=run.initialize,
        loss=run.loss,
        vocab_size=spec.model.vocab_size,
        seq_len=run.seq_len,
        hf_adapter=lambda: spec.state_dict_adapter(spec.model, None),
    )
