"""torchtitan 0.2.x: one set of model args describes every layer.

Source: ``models/<m>/model/args.py`` (the counts) and ``models/<m>/infra/parallelize.py`` (the plan) of
torchtitan 0.2.0, 0.2.1 and 0.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtitan_tp_validate.plans.reading import Heads, attention_heads, family_name, positive_int
from torchtitan_tp_validate.rules import Plan, group_by_size

HOW_TO_CHANGE = (
    "--parallelism.tensor_parallel_degree {tp}, or in the job's TOML file:\n"
    "  [parallelism]\n"
    "  tensor_parallel_degree = {tp}"
)
DIES_IN_FORWARD = (
    "the run starts, and its first forward pass dies in attention with\n"
    '  "shape \'[...]\' is invalid for input of size ..." or "Cannot unflatten unevenly sharded tensor".'
)
_CONSEQUENCES = {"TP001": DIES_IN_FORWARD, "TP002": DIES_IN_FORWARD}


def find_config(model_or_config: Any) -> Any | None:
    """The model args of a model, or the model args themselves, or None when this is neither."""
    args = getattr(model_or_config, "model_args", model_or_config)
    return args if hasattr(args, "n_heads") else None


def read(args: Any, model: Any) -> Plan:
    """The plan that ``parallelize_*`` of 0.2.x applies to a model with these args.

    Args:
        args: the model args.
        model: what the args were found on: a layer of it whose attention module has other head counts
            is believed over the args.
    """
    name = type(args).__name__
    n_layers = positive_int(args, "n_layers", name)
    declared = attention_heads(args, name)
    built = dict(_layer_heads(model))
    found = []
    for index in range(n_layers):
        heads = built.get(index, declared)
        # A built layer has n_kv_heads filled in where the args leave it to n_heads.
        heads = declared if _resolved(heads) == _resolved(declared) else heads
        found += [(code, size, index) for code, size in heads.items()]
    return Plan(
        model=family_name(args, has_experts=bool(getattr(args, "moe_enabled", False))),
        dims=group_by_size(found, _CONSEQUENCES),
        n_layers=n_layers,
        how_to_change=HOW_TO_CHANGE,
    )


def _resolved(heads: Heads) -> tuple[int, int]:
    return heads["TP001"], heads.get("TP002", heads["TP001"])


def _layer_heads(model: Any) -> Iterator[tuple[int, Heads]]:
    """``(index, heads)`` of the layers that this model, or pipeline stage, holds."""
    layers: Any = getattr(model, "layers", None)
    for index, layer in layers.items() if hasattr(layers, "items") else ():
        attention = getattr(layer, "attention", None)
        if hasattr(attention, "n_heads"):
            yield int(index), attention_heads(attention, f"layers.{index}.attention")
