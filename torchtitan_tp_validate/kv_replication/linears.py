"""The linears of torchtitan 0.3.x whose heads several ranks can share, of any precision, LoRA or none.

Whatever multiplies, it is handed the rows of one head in the place of a weight that is split over all ranks.
What LoRA adds is a product of two weights, the second of which has the rows of the base: it is shared
likewise.

Source: ``models/common/linear.py``, ``components/lora.py``, ``components/quantization`` of torchtitan 0.3.0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components import lora
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.models.common.linear import Linear

from torchtitan_tp_validate.kv_replication.gather import TP_AXIS, SharesKVHeads, rows_of_own_head


class _SharesKVHeads(SharesKVHeads):
    """What wk or wv does besides on the ``spmd_types`` backend, where nothing is a DTensor."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Keys or values of shape (batch, seq_len, local heads * head_dim)."""
        if isinstance(self.weight, DTensor) or self.n_kv_heads % spmd_mesh_size(TP_AXIS) == 0:
            return super().forward(input)
        bias = None if self.bias is None else _own_rows(self.bias, self.n_kv_heads)
        return self._multiply(input, _own_rows(self.weight, self.n_kv_heads), bias)


class TorchLinear(_SharesKVHeads, nn.Linear):  # type: ignore[misc]
    """k_proj or v_proj of a model that transformers has built."""

    _multiply = staticmethod(F.linear)


class KVHeadLinear(_SharesKVHeads, Linear):  # type: ignore[misc]
    """wk or wv, whose heads several ranks can share. At a degree that divides them it is a plain Linear."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):  # type: ignore[misc]
        """A Linear and the number of key-value heads that its rows make up."""

        n_kv_heads: int

        def build(self, **kwargs: Any) -> Any:
            """Return the linear; if LoRA has extended it, with an adapter that shares heads as well."""
            return _with_shared_adapter(Linear.Config.build(self, **kwargs))

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_kv_heads = config.n_kv_heads

    _multiply = staticmethod(F.linear)


@functools.cache
def _sharing(kind: Any) -> Any:
    """Return the class of a linear like this one whose heads several ranks can share."""
    if kind is Linear:
        return KVHeadLinear

    class LowPrecision(_SharesKVHeads, kind):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(kind.Config):  # type: ignore[misc]
            n_kv_heads: int

            def build(self, **kwargs: Any) -> Any:
                return _with_shared_adapter(kind.Config.build(self, **kwargs))

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.n_kv_heads = config.n_kv_heads

    LowPrecision.__name__ = LowPrecision.__qualname__ = f"KVHead{kind.__name__}"
    return LowPrecision


def gathering(projection: Any, n_kv_heads: int) -> Any:
    """Return the config of the same linear, sharing its heads; what LoRA made of it stays.

    Args:
        projection: the config of wk, of wv or of both.
        n_kv_heads: that its rows make up.
    """
    if hasattr(projection, "n_kv_heads"):
        return projection
    kind = projection._owner
    is_adapted = kind in lora._lora_class_cache.values()
    plain = kind.__base__ if is_adapted else kind
    kept = {f.name: getattr(projection, f.name) for f in fields(plain.Config) if f.init}
    kept["n_kv_heads"] = n_kv_heads
    shared = _sharing(plain)
    if is_adapted:
        adapted = lora._get_lora_cls(shared)
        return adapted.Config(**kept, rank=projection.rank, alpha=projection.alpha)
    config = shared.Config(**kept)
    is_frozen = type(projection) in lora._frozen_config_class_cache.values()
    return lora._make_frozen_config(config) if is_frozen else config


def _with_shared_adapter(linear: Any) -> Any:
    """Return the linear, the second factor of its adapter, if it has one, sharing the same heads."""
    second = getattr(linear, "lora_b", None)
    if second is not None:
        linear.lora_b = KVHeadLinear.Config(
            in_features=second.in_features,
            out_features=second.out_features,
            sharding_config=second._sharding_config,
            param_init=second._param_init,
            n_kv_heads=linear.n_kv_heads,
        ).build()
    return linear


@spmd.local_map(out_types={"dp": spmd.R, "cp": spmd.R, "tp": spmd.S(0)})  # type: ignore[untyped-decorator]
def _own_rows(shard: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """Return the rows of this rank's head from a shard of all, on the ``spmd_types`` backend."""
    mesh = current_spmd_mesh()
    assert mesh is not None
    group = mesh.get_group(TP_AXIS)
    whole = spmd.all_gather(shard, group, src=spmd.S(0), dst=spmd.R)
    # From here on each rank has rows of its own, whose gradients the gather's backward sums.
    whole = spmd.reinterpret(whole, group, src=spmd.R, dst=spmd.V, expert_mode=True)
    # Asked of the group: a mesh computes with tensors, which type checking would look at.
    return rows_of_own_head(whole, n_kv_heads=n_kv_heads, tp=group.size(), tp_rank=group.rank())
