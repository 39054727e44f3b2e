"""Shared heads in a model that transformers builds, before anything shards it."""

from __future__ import annotations

from types import SimpleNamespace as NS
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.torchtitan.installed import HAS_CONFIG_TREES

UNLIKE = """\
KV-head replication is not supported here: Attention.k_proj is a builtins.NoneType.
Without this check the run might die in its first forward pass, or train wrongly.
What works: torch.nn.Linear, or a tensor parallel degree that divides n_kv_heads without \
--replicate-kv-heads."""


def model_with(*projections: str) -> Any:
    """A model of 8 query heads and 2 KV heads, with the config that bridges to transformers."""
    import torch

    heads = {"n_heads": 8, "n_kv_heads": 2, "n_layers": 2, "head_dim": 4, "model_type": "qwen3"}
    config = NS(_tt_to_hf_attribute_map={}, **heads, **({"build": print} if HAS_CONFIG_TREES else {}))
    layers = []
    for _ in range(2):
        attention = type("Attention", (torch.nn.Module,), {"__module__": "transformers"})()
        attention.num_key_value_groups = 4
        for name in projections:
            setattr(attention, name, torch.nn.Linear(16, 32 if name == "q_proj" else 8))
        layers.append(NS(self_attn=attention))
    return NS(model=NS(config=config), layers=layers)


def share(model: Any, tp: int) -> None:
    """What the guard does in a call of torchtitan's function that parallelizes the model."""
    from torchtitan_tp_validate.releases import kv_replication_of, line_of

    def parallelize() -> None: ...

    parallelize.__module__ = "torchtitan.experiments.transformers_modeling_backend.parallelize"
    call: dict[str, Any] = {"model": model, "parallel_dims": NS(tp=tp, dp_shard=1)}
    if not HAS_CONFIG_TREES:
        from torchtitan.config import JobConfig

        call["job_config"] = JobConfig()
    kv_replication_of(line_of(model)).put_into_call(parallelize, call, tp)


def test_k_proj_and_v_proj_share_heads_and_keep_their_parameters() -> None:
    from torchtitan_tp_validate.kv_replication.gather import SharesKVHeads

    model = model_with("q_proj", "k_proj", "v_proj")
    before = [dict(layer.self_attn.named_parameters()) for layer in model.layers]
    share(model, 4)
    for layer, parameters in zip(model.layers, before, strict=True):
        after = dict(layer.self_attn.named_parameters())
        assert after.keys() == parameters.keys()
        assert all(after[name] is parameters[name] for name in after)
        sharing = [name for name, part in layer.self_attn.named_children() if isinstance(part, SharesKVHeads)]
        assert sharing == ["k_proj", "v_proj"]
        # Of the two query heads of a rank.
        assert layer.self_attn.num_key_value_groups == 2


def test_nothing_is_changed_at_a_degree_that_divides_the_kv_heads() -> None:
    import torch

    model = model_with("q_proj", "k_proj", "v_proj")
    share(model, 2)
    for layer in model.layers:
        assert {type(part) for part in layer.self_attn.children()} == {torch.nn.Linear}
        assert layer.self_attn.num_key_value_groups == 4


def test_an_attention_without_such_projections_is_refused() -> None:
    model = model_with("qkv_proj")
    share(model, 2)
    with pytest.raises(tpv.KVReplicationError) as caught:
        share(model, 4)
    assert str(caught.value) == UNLIKE
