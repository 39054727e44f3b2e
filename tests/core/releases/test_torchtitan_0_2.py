from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torchtitan_tp_validate as tpv
from tests.core.shapes import attention_layer, model_args
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.releases import read_plan


def test_missing_n_kv_heads_means_mla_and_none_means_n_heads() -> None:
    mla = SimpleNamespace(n_heads=16, n_layers=3)
    for args in (mla, model_args(16, None, 3)):
        (dim,) = read_plan(args).dims
        assert (dim.code, dim.size, dim.layers) == ("TP001", 16, (0, 1, 2))


def test_a_model_is_read_through_its_args() -> None:
    assert tpv.valid_tp_degrees(SimpleNamespace(model_args=model_args(8, 2))) == [1, 2]


def test_a_pipeline_stage_is_judged_by_the_whole_model() -> None:
    args = model_args(8, 2, n_layers=4)
    stage = SimpleNamespace(model_args=args, layers={"3": attention_layer(8, 2)})
    empty_stage = SimpleNamespace(model_args=args, layers={})
    assert read_plan(stage) == read_plan(empty_stage) == read_plan(args)


def test_a_built_layer_that_differs_from_the_args_is_believed() -> None:
    model = SimpleNamespace(
        model_args=model_args(8, 4, n_layers=3),
        layers={"0": attention_layer(8, 4), "1": attention_layer(8, 2), "2": attention_layer(8, 4)},
    )
    sizes = {(dim.code, dim.size): dim.layers for dim in read_plan(model).dims}
    assert sizes == {("TP001", 8): (0, 1, 2), ("TP002", 4): (0, 2), ("TP002", 2): (1,)}


def test_a_rule_without_its_input_is_named() -> None:
    def not_judged(layers: dict[str, Any] | None = None, seq_len: int | None = 64, **args: Any) -> list[str]:
        model = SimpleNamespace(model_args=model_args(8, 2, vocab_size=256, **args), layers=layers or {})
        return list(read_plan(model, Degrees(tp=2, seq_len=seq_len)).not_judged)

    mlp = SimpleNamespace(w1=SimpleNamespace(out_features=64))
    assert not_judged({"0": SimpleNamespace(feed_forward=mlp)}) == []
    assert not_judged() == ["TP005: the feed-forward's size is known when the model is built"]
    assert not_judged({"0": SimpleNamespace(feed_forward=mlp)}, None) == ["TP009: no seq_len is given"]
    assert not_judged({"1": SimpleNamespace(feed_forward=SimpleNamespace(up=mlp))}) == [
        "TP005: layers.1.feed_forward.w1 has no out_features"
    ]
    moe = SimpleNamespace(shared_experts=SimpleNamespace(up=mlp), experts=SimpleNamespace())
    assert not_judged({"0": SimpleNamespace(moe=moe)}) == [
        "TP010: layers.0.moe.shared_experts.w1 has no out_features",
        "TP011, TP013, FSDP001: layers.0.moe.experts has no weight of a known name",
    ]
    sizes = read_plan(
        model_args(8, 2, vocab_size=None, moe_enabled=True), Degrees(tp=2, seq_len=64)
    ).not_judged
    assert sizes[1:] == (
        "TP006: SimpleNamespace.vocab_size is None",
        "EP001: SimpleNamespace.moe_args.num_experts is None",
    )
