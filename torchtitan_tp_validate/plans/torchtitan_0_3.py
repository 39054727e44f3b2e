"""torchtitan 0.3.x and the qwen3_5_moe fork: a config tree describes the model.

0.3.x has a config for each layer (``config.layers[i].attention.n_kv_heads``); a gated-delta layer has
no attention but a ``delta_net``. The fork generation (upstream pull request #2545) has one layer config
for all layers (``config.layer.attention.n_kv_heads``) and replicates its gated-delta layers over TP.

Source: ``models/common/decoder.py`` and ``models/qwen3_5/model.py`` of torchtitan 0.3.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtitan_tp_validate.plans.reading import Heads, attention_heads, family_name, positive_int
from torchtitan_tp_validate.rules import Plan, group_by_size

HOW_TO_CHANGE = (
    "--parallelism.tensor_parallel_degree {tp}, or in the config registry:\n"
    "  parallelism=ParallelismConfig(tensor_parallel_degree={tp})"
)
_DIES_LATE = (
    "torchtitan looks at the first such layer only, and not before the process groups\n"
    "  are up; any other one kills the first forward pass with\n"
    "  \"shape '[...]' is invalid for input of size ...\"."
)
_CONSEQUENCES = dict.fromkeys(("TP001", "TP002", "TP003", "TP004"), _DIES_LATE)


def find_config(model_or_config: Any) -> Any | None:
    """The config tree of a model, or the tree itself, or None when this is neither."""
    config = getattr(model_or_config, "config", model_or_config)
    return config if _has_layer_list(config) or hasattr(config, "layer") else None


def read(config: Any, model: Any) -> Plan:
    """The plan that the model's parallelization applies to a model with this config tree.

    Modules are built from the tree, so the tree is the truth and ``model`` is not looked into.
    """
    del model
    readings = list(_layer_readings(config))
    return Plan(
        model=family_name(config, has_experts=_has_experts(config)),
        dims=group_by_size(
            (
                (code, size, index)
                for index, (_, heads) in enumerate(readings)
                for code, size in (heads or {}).items()
            ),
            _CONSEQUENCES,
        ),
        n_layers=len(readings),
        how_to_change=HOW_TO_CHANGE,
        unread=tuple(where for where, heads in readings if heads is None),
    )


def _layer_readings(config: Any) -> Iterator[tuple[str, Heads | None]]:
    """``(path, sharded heads)`` of every layer in order; None for a layer that cannot be read."""
    if _has_layer_list(config):
        for index, layer in enumerate(config.layers):
            yield f"layers[{index}]", _layer_heads(layer, f"layers[{index}]")
        for index, layer in enumerate(getattr(config, "mtp_layers", ())):
            yield f"mtp_layers[{index}]", _layer_heads(layer, f"mtp_layers[{index}]")
        return
    for index in range(positive_int(config, "n_layers", type(config).__qualname__)):
        # models/qwen3_5_moe/model.py of the fork: every interval-th layer attends, counted from 1.
        attends = (index + 1) % getattr(config, "full_attention_interval", 1) == 0
        yield "layer", attention_heads(config.layer.attention, "layer.attention") if attends else {}


def _layer_heads(layer: Any, where: str) -> Heads | None:
    """The sharded heads of one layer config, or None when it has no mixer that we know."""
    attention = getattr(layer, "attention", None)
    if hasattr(attention, "n_heads"):
        return attention_heads(attention, f"{where}.attention")
    delta_net = getattr(layer, "delta_net", None)
    if delta_net is None:
        return None
    where = f"{where}.delta_net"
    return {
        "TP003": _projected_heads(delta_net, "in_proj_q", "key_head_dim", where),
        "TP004": _projected_heads(delta_net, "in_proj_v", "value_head_dim", where),
    }


def _projected_heads(delta_net: Any, projection: str, head_dim: str, where: str) -> int:
    """A gated-delta layer declares no head counts: they follow from the width of its projections."""
    width = positive_int(getattr(delta_net, projection, None), "out_features", f"{where}.{projection}")
    return width // positive_int(delta_net, head_dim, where)


def _has_experts(config: Any) -> bool:
    layers = config.layers if _has_layer_list(config) else [getattr(config, "layer", None)]
    return any(getattr(layer, "moe", None) is not None for layer in layers)


def _has_layer_list(config: Any) -> bool:
    return isinstance(getattr(config, "layers", None), (list, tuple))
