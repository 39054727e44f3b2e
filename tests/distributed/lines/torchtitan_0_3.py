"""The model families of torchtitan 0.3.x at debug size (default ``spmd_backend``: "spmd_types").

After ``parallelize_fn`` every parameter that takes part in training is a DTensor over the storage
mesh (``dp_shard``, ``tp``), because torchtitan applies ``fully_shard`` even when data parallelism has
degree 1: ``.full_tensor()`` gives the whole parameter or gradient. The ``TP = 1`` reference is the
plain module; it needs no ``parallelize_fn`` (and, on CPU, no process group).

On CPU the gated-delta layers see no document boundaries, so they read a batch as one long stream: two
runs compare equal when they are fed the same batch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from . import TinyModel

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims
    from torchtitan.protocols.model_spec import ModelSpec

VOCAB_SIZE = 256
SEQ_LEN = 32
HEAD_DIM = 64
UPSTREAM_CHECKS = True
"""Unlike 0.2.x, this line has a head check of its own."""

GATED_DELTA_HEADS = 4
"""Key heads, and value heads: every degree up to 4 splits them, so that only n_kv_heads can be wrong."""


@dataclass(frozen=True)
class _Family:
    """Where torchtitan keeps a family, and which of its debug layers are enough to test it.

    Attributes:
        package: the package under ``torchtitan.models``.
        flavor: the name that its ``model_registry`` knows.
        layers: the layers of the flavour to keep.
        entry_point: the parallelize function in the package's ``parallelize`` module.
        wrapper: the name of our wrapper module.
    """

    package: str
    flavor: str
    layers: slice
    entry_point: str
    wrapper: str


_FAMILIES = {
    "llama3": _Family("llama3", "debugmodel", slice(0, 2), "parallelize_llama", "llama3"),
    "qwen3": _Family("qwen3", "debugmodel_non_fused_qkv", slice(0, 2), "parallelize_qwen3", "qwen3"),
    "qwen3_fused": _Family("qwen3", "debugmodel", slice(0, 2), "parallelize_qwen3", "qwen3"),
    # Every fourth layer has full attention: layer 2 is a gated-delta layer, layer 3 is not.
    "qwen3_5": _Family("qwen3_5", "debugmodel", slice(2, 4), "parallelize_qwen3_5", "qwen3_5_moe"),
    "qwen3_5_moe": _Family("qwen3_5", "debugmodel_moe", slice(2, 4), "parallelize_qwen3_5", "qwen3_5_moe"),
}

FAMILIES = tuple(_FAMILIES)


# --- what the device needs -------------------------------------------------------------------------


def prepare(device_type: str) -> None:
    """Set this process up for models on ``device_type``; to be called before the first process group."""
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("spmd_types")
    # torchtitan does the same in init_distributed: its current mesh is thread-local.
    torch.autograd.set_multithreading_enabled(False)
    if device_type == "cpu":
        _select_cpu()
        _run_experts_without_gpu_kernels()
        _run_gated_delta_without_gpu_kernels()


def _select_cpu() -> None:
    """Make torchtitan build its meshes on CPU; without an accelerator it assumes CUDA."""
    import torchtitan.distributed.parallel_dims
    import torchtitan.tools.utils

    torchtitan.tools.utils.device_type = "cpu"
    torchtitan.distributed.parallel_dims.device_type = "cpu"


def _on_cpu() -> bool:
    """Whether `prepare` chose the CPU."""
    from torchtitan.tools import utils

    return utils.device_type == "cpu"


def _run_experts_without_gpu_kernels() -> None:
    """Let routed experts multiply in fp32, one expert after the other."""
    from torchtitan.models.common.moe import GroupedExperts

    if hasattr(GroupedExperts.forward, "__wrapped__"):
        return
    stock_forward = GroupedExperts.forward

    @functools.wraps(stock_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The stock forward casts to bf16, in which no two degrees would agree.
        with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor):
            return stock_forward(self, *args, **kwargs)

    def grouped_mm(
        self: nn.Module, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor
    ) -> torch.Tensor:
        sizes = torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
        return torch.cat([rows @ weight for rows, weight in zip(A.split(sizes), B_t, strict=True)])

    GroupedExperts.forward = forward
    GroupedExperts._grouped_mm = grouped_mm


def _run_gated_delta_without_gpu_kernels() -> None:
    """Put transformers' pure-torch gated delta rule in the place of fla's Triton kernel."""
    import torchtitan.models.qwen3_5.model as qwen3_5
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as transformers_qwen3_5

    # Unwrapped, because the decorator would send the call back to fla.
    kernel = inspect.unwrap(transformers_qwen3_5.torch_chunk_gated_delta_rule)
    qwen3_5._fla_chunk_gated_delta_rule = kernel


def _sum_gradients_without_nccl(model: nn.Module) -> None:
    """Let data parallelism reduce gradients by a plain sum: gloo has no sum with a factor."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


# --- the configuration -----------------------------------------------------------------------------


def _tiny_spec(family: _Family, n_heads: int, n_kv_heads: int) -> ModelSpec:
    """The registry's spec of this family, its model config cut down and given these head counts."""
    registry = import_module(f"torchtitan.models.{family.package}").model_registry
    spec = registry(family.flavor, attn_backend="flex")
    config = spec.model
    config.layers = config.layers[family.layers]
    _set_vocab_size(config)
    for layer in config.layers:
        if layer.attention is not None:
            layer.attention = _attention_with_heads(layer.attention, n_heads, n_kv_heads)
        if getattr(layer, "delta_net", None) is not None:
            _set_gated_delta_heads(layer.delta_net)
    if hasattr(config, "vision_encoder"):
        config.vision_encoder = dataclasses.replace(config.vision_encoder, num_layers=1)
    return spec


def _set_vocab_size(config: Any) -> None:
    """Give the model `VOCAB_SIZE` tokens."""
    config.vocab_size = VOCAB_SIZE
    config.tok_embeddings = dataclasses.replace(config.tok_embeddings, num_embeddings=VOCAB_SIZE)
    config.lm_head = dataclasses.replace(config.lm_head, out_features=VOCAB_SIZE)


def _attention_with_heads(attention: Any, n_heads: int, n_kv_heads: int) -> Any:
    """The same attention with these head counts and `HEAD_DIM`, on a kernel that the device has."""
    from torchtitan.models.common.attention import GQAttention, ScaledDotProductAttention

    if _on_cpu():
        # Flex attention has no backward on CPU.
        attention.inner_attention = ScaledDotProductAttention.Config()
    if isinstance(attention, GQAttention.Config):
        return _gqa_with_heads(attention, n_heads, n_kv_heads)
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
        rope=dataclasses.replace(attention.rope, dim=HEAD_DIM, max_seq_len=SEQ_LEN),
        fuse_qkv=isinstance(attention.qkv_linear, FusedQKVLinear.Config),
        qk_norm=qk_norm and dataclasses.replace(qk_norm, normalized_shape=HEAD_DIM),
    )


def _gated_attention_with_heads(attention: Any, n_heads: int, n_kv_heads: int) -> Any:
    """qwen3_5: wq carries a gate besides the query, and RoPE turns only part of a head."""
    resize = dataclasses.replace
    return resize(
        attention,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=HEAD_DIM,
        rope=resize(attention.rope, max_seq_len=SEQ_LEN),
        wq=resize(attention.wq, out_features=n_heads * HEAD_DIM * 2),
        wk=resize(attention.wk, out_features=n_kv_heads * HEAD_DIM),
        wv=resize(attention.wv, out_features=n_kv_heads * HEAD_DIM),
        wo=resize(attention.wo, in_features=n_heads * HEAD_DIM),
        q_norm=resize(attention.q_norm, dim=HEAD_DIM),
        k_norm=resize(attention.k_norm, dim=HEAD_DIM),
    )


def _set_gated_delta_heads(delta_net: Any) -> None:
    """Give a gated-delta layer `GATED_DELTA_HEADS` key heads and as many value heads."""
    key_width = GATED_DELTA_HEADS * delta_net.key_head_dim
    value_width = GATED_DELTA_HEADS * delta_net.value_head_dim
    outputs = {"q": key_width, "k": key_width, "v": value_width, "z": value_width}
    outputs |= {"a": GATED_DELTA_HEADS, "b": GATED_DELTA_HEADS}
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


def _update_for_tensor_parallel(config: Any, tp: int, upstream_check: bool) -> None:
    """Let the model config see the run's parallelism, as the Trainer does before it builds.

    Upstream's head checks run when the degree is above 1, while the sharding that this call also sets
    up is the same at every degree: told 1, it does everything but check.
    """
    from torchtitan.config import ParallelismConfig

    seen = ParallelismConfig(tensor_parallel_degree=tp if upstream_check else 1)
    config.update_from_config(config=SimpleNamespace(parallelism=seen))


# --- training --------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One model's life from configuration to loss.

    Attributes:
        config: the model config, already updated for the run.
        parallel_dims: what the model was parallelized over; None while it is the plain module.
    """

    config: Any
    parallel_dims: ParallelDims | None = None

    def arguments(self, parallel_dims: ParallelDims) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What follows the model in a call of the parallelize function."""
        from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig

        self.parallel_dims = parallel_dims
        return (), {
            "parallel_dims": parallel_dims,
            "training": TrainingConfig(mixed_precision_param="float32"),
            "parallelism": ParallelismConfig(tensor_parallel_degree=parallel_dims.tp),
            "compile_config": CompileConfig(enable=False),
            "ac_config": None,
            "dump_folder": "",
        }

    @torch.no_grad()
    def initialise(self, model: nn.Module, device: torch.device) -> None:
        """Materialise the model and draw its weights whole, on CPU, at every degree alike."""
        if _on_cpu():
            _sum_gradients_without_nccl(model)
        drawn = self.config.build()
        drawn.init_states(buffer_device=None)
        weights = dict(drawn.named_parameters())
        model.to_empty(device=device)
        model.init_states(buffer_device=None)
        for name, parameter in model.named_parameters():
            weight = weights[name].to(device)
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
            parameter.copy_(weight)

    def loss(self, model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of this rank's tokens; gradients are means over all ranks' tokens."""
        from torchtitan.components.loss import cross_entropy_loss

        with self._current_mesh():
            logits = model(tokens, **self._model_arguments(model, tokens))
            total = cross_entropy_loss(logits, labels, global_vocab_size=VOCAB_SIZE)
        mean = total / labels.numel()
        # Data parallelism sums gradients over its ranks, so each rank owns a share of the mean.
        share = mean / (self.parallel_dims.dp_shard if self.parallel_dims else 1)
        return share + (mean - share).detach()

    def _current_mesh(self) -> AbstractContextManager[None]:
        """The mesh that torchtitan's collectives and annotations read from the context."""
        from torchtitan.distributed.utils import get_spmd_context

        if self.parallel_dims is not None:
            return get_spmd_context(parallel_dims=self.parallel_dims)()
        if _on_cpu():
            return nullcontext()
        # The masks that qwen3_5 takes on a GPU are annotated by axis, also in the plain module.
        return get_spmd_context(parallel_dims=self._plain_dims)()

    @functools.cached_property
    def _plain_dims(self) -> ParallelDims:
        """No model parallelism: what the plain module runs under where it needs a mesh."""
        return _parallel_dims(1, torch.distributed.get_world_size())

    def _model_arguments(self, model: nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
        """What the Trainer would feed beside the tokens."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
        arguments: dict[str, Any] = {"positions": positions}
        if not _on_cpu():
            arguments["attention_masks"] = model.get_attention_masks(positions)
        if hasattr(self.config, "vision_encoder"):
            # Ids that no token has: text only.
            arguments["special_tokens"] = {"image_id": -1, "video_id": -2}
        return arguments


def _parallel_dims(tp: int, world_size: int) -> ParallelDims:
    """Tensor parallelism of degree ``tp``; the ranks that are left shard the data."""
    from torchtitan.config import ParallelismConfig
    from torchtitan.distributed import ParallelDims

    return ParallelDims.from_config(ParallelismConfig(tensor_parallel_degree=tp), world_size)


def build(family: str, *, n_heads: int, n_kv_heads: int, tp: int, upstream_check: bool = True) -> TinyModel:
    """A tiny model of this family, configured for a run at degree ``tp``.

    Raises:
        ValueError: from torchtitan's own head check, unless ``upstream_check`` is off.
    """
    described = _FAMILIES[family]
    spec = _tiny_spec(described, n_heads, n_kv_heads)
    _update_for_tensor_parallel(spec.model, tp, upstream_check)
    with torch.device("meta"):
        model = spec.model.build()
    run = _Run(spec.model)
    parallelize_fn: Callable[..., nn.Module] = spec.parallelize_fn
    return TinyModel(
        model=model,
        parallelize_fn=parallelize_fn,
        entry_point=(f"torchtitan.models.{described.package}.parallelize", described.entry_point),
        wrapper=described.wrapper,
        make_parallel_dims=_parallel_dims,
        arguments=run.arguments,
        initialise=run.initialise,
        loss=run.loss,
        vocab_size=VOCAB_SIZE,
        seq_len=SEQ_LEN,
    )
