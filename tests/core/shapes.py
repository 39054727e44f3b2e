"""Objects with the shape of torchtitan's, for tests that need no torchtitan."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import ShardedDim, describe_places
from torchtitan_tp_validate.validate import judge


def model_args(n_heads: Any = 8, n_kv_heads: Any = 2, n_layers: Any = 2, **more: Any) -> Any:
    """Model args of 0.2.x."""
    return SimpleNamespace(n_heads=n_heads, n_kv_heads=n_kv_heads, n_layers=n_layers, **more)


def args_of(package: str, **fields: Any) -> Any:
    """Model args of a class that a package of torchtitan 0.2.x has."""
    module = f"torchtitan.models.{package}.model.args"
    return type("ModelArgs", (SimpleNamespace,), {"__module__": module})(**vars(model_args(**fields)))


def model_with_experts(hidden: int = 36, *, grouped: bool = False, fused: bool = False, **more: Any) -> Any:
    """A built model of 0.2.x with four experts and a residual stream of 64."""
    shapes = {"w1": (4, hidden, 64), "w2": (4, 64, hidden), "w3": (4, hidden, 64)}
    if fused:
        shapes = {"mlp1_weight": (4, 2 * hidden, 64), "mlp2_weight": (4, 64, hidden)}
    weights = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    experts = SimpleNamespace(_parameters=weights, use_grouped_mm=grouped)
    args = model_args(**{"n_heads": 8, "n_kv_heads": 8, "n_layers": 1, **more})
    layer = SimpleNamespace(attention=None, moe=SimpleNamespace(shared_experts=None, experts=experts))
    return SimpleNamespace(model_args=args, layers={"0": layer})


def attention_layer(n_heads: Any = 8, n_kv_heads: Any = 2) -> Any:
    """A full-attention layer's config of 0.3.x."""
    return SimpleNamespace(
        attention=SimpleNamespace(n_heads=n_heads, n_kv_heads=n_kv_heads), delta_net=None, moe=None
    )


def delta_layer(n_key_heads: int = 4, n_value_heads: int = 8, head_dim: int = 16) -> Any:
    """A gated-delta layer's config of 0.3.x."""
    return SimpleNamespace(
        attention=None,
        moe=None,
        delta_net=SimpleNamespace(
            key_head_dim=head_dim,
            value_head_dim=head_dim,
            in_proj_q=SimpleNamespace(out_features=n_key_heads * head_dim),
            in_proj_v=SimpleNamespace(out_features=n_value_heads * head_dim),
        ),
    )


def config_tree(*layers: Any, **more: Any) -> Any:
    """A model config of 0.3.x."""
    return SimpleNamespace(layers=list(layers), **more)


def told(dims: Iterable[ShardedDim], n_layers: int) -> list[str]:
    """What there is to say of each dimension, without its reason: code, name, size, split and place."""
    return [
        f"{dim.code} {dim.name} {dim.size}: {dim.split.value}, in {describe_places(dim, n_layers)}"
        for dim in dims
    ]


def refusal(model: Any, degrees: Degrees) -> tpv.TPCompatError:
    """What a model is refused with."""
    with pytest.raises(tpv.TPCompatError) as caught:
        judge(model, degrees, model_name="Tiny")
    return caught.value
