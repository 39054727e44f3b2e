"""A model package of somebody's own, for torchtitan 0.3.x: Llama's attention, and a feed-forward of its own.

Registered as torchtitan's packages are: ``--module tests.rehearsal.own_model``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import spmd_types as spmd
import torch
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models import llama3
from torchtitan.models.common import Linear
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import (
    colwise_config,
    dense_activation_placement,
    dense_sequence_parallel_placement,
    norm_config,
    rowwise_config,
    set_decoder_sharding_config,
    set_gqa_attention_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from torchtitan_tp_validate.kv_replication import ReplicateKVHeads
from torchtitan_tp_validate.rehearsal.models.torchtitan_0_3 import with_heads


class Expander(Module):
    """A feed-forward without a gate, under names of its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Its two linears."""

        widen: Linear.Config
        narrow: Linear.Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.widen = config.widen.build()
        self.narrow = config.narrow.build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Widen, and narrow again."""
        return self.narrow(torch.relu(self.widen(x)))


class OwnBlock(Llama3TransformerBlock):
    """A block with an `Expander`."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3TransformerBlock.Config):
        """Llama's, whose ``feed_forward`` is empty."""

        expander: Expander.Config

    def __init__(self, config: Config) -> None:
        Module.__init__(self)
        self.attention = config.attention.build()
        self.expander = config.expander.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()

    def forward(self, x: torch.Tensor, attention_masks: Any, positions: Any = None) -> torch.Tensor:
        """Attend, and expand."""
        h = x + self.attention(self.attention_norm(x), attention_masks, positions)
        return h + self.expander(self.ffn_norm(h))


class OwnModel(Llama3Model):
    """Llama with blocks of its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        """Llama's."""

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Declare what is sharded."""
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            sp = config.parallelism.enable_sequence_parallel
            set_decoder_sharding_config(self, enable_sp=sp)
            for layer in self.layers:
                layer.attention_norm.sharding_config = layer.ffn_norm.sharding_config = norm_config(
                    enable_sp=sp
                )
                set_gqa_attention_sharding(layer.attention, enable_sp=sp)
                set_gqa_inner_attention_local_map(layer.attention.inner_attention)
                _shard(layer.expander, sp)


def _shard(expander: Expander.Config, sp: bool) -> None:
    enters = dense_sequence_parallel_placement() if sp else dense_activation_placement(tp=spmd.I)
    expander.sharding_config = ShardingConfig(
        in_src_shardings={"x": enters},
        in_dst_shardings={"x": dense_activation_placement(tp=spmd.R)},
    )
    expander.widen.sharding_config = colwise_config()
    expander.narrow.sharding_config = rowwise_config(output_sp=sp)


def parallelize_own(model: Any, **how: Any) -> Any:
    """Parallelize as Llama is: what is sharded is in the config."""
    return llama3.parallelize_llama(model, **how)


def _of(flavor: str, widths: int, layers: int | None = None) -> OwnModel.Config:
    """Return Llama's config of a flavor, its feed-forward replaced by one of so many times its width.

    Args:
        layers: how many of its layers, if not all.
    """
    llama = llama3.llama3_configs[flavor](attn_backend="flex")
    own = OwnModel.Config(**{f.name: getattr(llama, f.name) for f in fields(llama) if f.init})
    own.layers = [_block(layer, llama.dim, widths * llama.dim) for layer in llama.layers[:layers]]
    return own


def _sharing(config: OwnModel.Config, n_heads: int, n_kv_heads: int) -> Any:
    """Return the config with these heads, the key-value heads of which ranks may share."""
    for layer in config.layers:
        layer.attention = with_heads(layer.attention, n_heads, n_kv_heads)
    return ReplicateKVHeads.Config().build().convert(config)


def _block(layer: Any, dim: int, hidden_dim: int) -> OwnBlock.Config:
    kept = {f.name: getattr(layer, f.name) for f in fields(layer) if f.init} | {"feed_forward": None}
    init = layer.feed_forward.w2.param_init
    expander = Expander.Config(
        widen=Linear.Config(in_features=dim, out_features=hidden_dim, param_init=init),
        narrow=Linear.Config(in_features=hidden_dim, out_features=dim, param_init=init),
    )
    return OwnBlock.Config(**kept, expander=expander)


own_configs = {
    "8B": lambda: _of("8B", widths=4),
    # Which side of its linears is the residual stream cannot be seen.
    "8B-square": lambda: _of("8B", widths=1),
    "small-shared": lambda: _sharing(_of("debugmodel", widths=1, layers=1), n_heads=8, n_kv_heads=1),
}


def model_registry(flavor: str) -> ModelSpec:
    """Return the spec of a flavor."""
    return ModelSpec(
        name="own",
        flavor=flavor,
        model=own_configs[flavor](),
        parallelize_fn=parallelize_own,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
