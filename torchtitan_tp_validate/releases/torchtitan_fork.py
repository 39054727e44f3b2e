"""The qwen3_5_moe fork (upstream pull request #2545), and main of that time: one layer config for all layers.

It declares no shardings (``config.layer.attention.n_kv_heads``). It splits what 0.2.x splits, by the same
DTensors and with the same consequences, and replicates its gated-delta layers over TP.

Source: ``models/*/parallelize.py`` and ``models/*/model.py`` of the pull request.
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import Plan, PlanBuilder, Split
from torchtitan_tp_validate.releases import torchtitan_0_2 as line_0_2
from torchtitan_tp_validate.releases.reading import attention_heads, family_name, positive_int
from torchtitan_tp_validate.releases.torchtitan_0_3 import HOW_TO_CHANGE
from torchtitan_tp_validate.rules import Line


def find_config(model_or_config: Any) -> Any | None:
    """Return the config of a model, or the config itself, or None when this is neither."""
    config = getattr(model_or_config, "config", model_or_config)
    return config if hasattr(config, "layer") else None


def read(config: Any, model: Any, degrees: Degrees) -> Plan:
    """Return the plan that the fork's parallelization applies to a model with this config."""
    del model
    n_layers = positive_int(config, "n_layers", type(config).__qualname__)
    layer = config.layer
    heads = attention_heads(layer.attention, "layer.attention")
    findings = PlanBuilder(Line.TORCHTITAN_0_2)
    for index in range(n_layers):
        # models/qwen3_5_moe/model.py: every interval-th layer attends, counted from 1.
        if (index + 1) % getattr(config, "full_attention_interval", 1) == 0:
            for code, size in heads.items():
                findings.add(code, size, layers=(index,))
        _read_mlp(layer, index, findings)
    line_0_2.read_sequence(findings, degrees)
    if getattr(config, "vocab_size", None) is None:
        findings.leave_out("TP006: the config has no vocab_size")
    else:
        size = positive_int(config, "vocab_size", type(config).__qualname__)
        findings.add("TP006", size, place="tok_embeddings, output", split=Split.NOT_EMPTY)
    if getattr(layer, "moe", None) is not None:
        findings.leave_out("TP011, TP013, FSDP001: the routed experts of this torchtitan are not read")
    plan = Plan(
        model=family_name(config, has_experts=getattr(layer, "moe", None) is not None),
        dims=findings.dims(),
        n_layers=n_layers,
        how_to_change=HOW_TO_CHANGE,
        not_judged=tuple(findings.not_judged),
    )
    return plan.of_own_function() if degrees.by_own_function else plan


def _read_mlp(layer: Any, index: int, findings: PlanBuilder) -> None:
    """Note what the feed-forward and the experts of one layer are split by."""
    moe, dense = getattr(layer, "moe", None), getattr(layer, "feed_forward", None)
    has_moe = moe is not None and _has_moe(layer, index)
    # In qwen3_5_moe the feed-forward is the expert that all tokens share, beside the others.
    shared = hasattr(layer, "deltanet")
    if dense is not None and (shared or not has_moe):
        hidden = positive_int(dense, "hidden_dim", "layer.feed_forward")
        findings.add("TP010" if shared else "TP005", hidden, layers=(index,))
    if not has_moe:
        return
    if getattr(moe, "num_experts", None) is not None:
        experts = positive_int(moe, "num_experts", "layer.moe")
        findings.add("EP001", experts, layers=(index,))
    if getattr(moe, "num_shared_experts", 0):
        hidden = positive_int(moe, "hidden_dim", "layer.moe")
        hidden *= positive_int(moe, "num_shared_experts", "layer.moe")
        findings.add("TP010", hidden, layers=(index,))


def _has_moe(layer: Any, index: int) -> bool:
    """Whether the fork gives this layer experts, where its config has some for those that do."""
    if not getattr(layer, "moe_enabled", True):  # qwen3
        return False
    # deepseek_v3 starts with dense layers, llama4 alternates; the others have experts in every layer.
    step: int = getattr(layer, "interleave_moe_layer_step", 1)
    first: int = getattr(layer, "n_dense_layers", 0)
    return index >= first and (index + 1) % step == 0
