from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import args_of, attention_layer, model_args, model_with_experts, told
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import Split
from torchtitan_tp_validate.releases import read_plan
from torchtitan_tp_validate.rules import RULES, Line


def test_missing_n_kv_heads_means_mla_and_none_means_n_heads() -> None:
    mla = SimpleNamespace(n_heads=16, n_layers=3)
    for args in (mla, model_args(16, None, 3)):
        (dim,) = read_plan(args).dims
        assert (dim.code, dim.size, dim.layers) == ("TP001", 16, (0, 1, 2))


def test_a_number_that_is_not_there_is_named() -> None:
    with pytest.raises(tpv.PlanError) as caught:
        read_plan(SimpleNamespace(n_heads=8))
    assert str(caught.value) == (
        "Not validated: SimpleNamespace.n_layers must be a positive whole number, got None."
    )


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


def test_a_model_is_named_for_its_family_else_for_its_class() -> None:
    class Mine:
        Config = type("Config", (SimpleNamespace,), {"__qualname__": "Mine.Config"})

    experts = SimpleNamespace(num_experts=4)
    assert read_plan(args_of("llama3", head_dim=4)).model == "Llama 3"
    assert read_plan(args_of("llama4", head_dim=4, moe_args=experts)).model == "Llama 4"
    assert read_plan(args_of("qwen3", head_dim=4)).model == "Qwen3"
    assert read_plan(args_of("qwen3", head_dim=4, moe_args=experts)).model == "Qwen3-MoE"
    assert read_plan(Mine.Config(**vars(model_args()))).model == "Mine"


def test_key_value_heads_are_shared_by_the_families_that_can_and_nobody_else() -> None:
    def shared(args: Any) -> list[tuple[str, str, tuple[int, ...], Split, str]]:
        return [
            (dim.code, str(dim.size), dim.layers, dim.split, dim.otherwise.text)
            for dim in read_plan(args).shared_kv
        ]

    heads, rows = (RULES[code].otherwise for code in ("TP002", "TP014"))
    layers = (0, 1)
    both = [
        ("TP002", "2", layers, Split.SHARED, heads[Line.KV_REPLICATION].text),
        ("TP014", "32", layers, Split.EVEN, rows[Line.TORCHTITAN_0_2].text),
    ]
    for args in (
        args_of("llama3", head_dim=16),
        args_of("llama3", head_dim=None, dim=128),
        args_of("qwen3", dim=128),
    ):
        assert shared(args) == both
        assert read_plan(args).how_to_replicate == "--replicate-kv-heads, or install(replicate_kv_heads=True)"
    assert shared(args_of("gpt_oss", head_dim=16)) == shared(model_args(head_dim=16)) == []


def test_everything_that_a_built_model_splits_is_named_with_its_place() -> None:
    fused = model_with_experts(28, fused=True, vocab_size=1, moe_args=SimpleNamespace(num_experts=4))
    heads = ["TP001 n_heads 8: even, in the only layer", "TP002 n_kv_heads 8: even, in the only layer"]
    hidden = ["TP011 expert_hidden_dim 28: in step, in the only layer"]
    # Eight ranks, four experts: FSDP cuts rows.
    rows = [
        "FSDP001 2 * expert_hidden_dim / tp 28: even, in the only layer",
        "FSDP001 dim 64: even, in the only layer",
    ]
    rest = [
        "TP006 vocab_size 1: not empty, in tok_embeddings, output",
        "EP001 num_experts 4: even, in every MoE layer",
    ]

    def split(**degrees: int) -> list[str]:
        return told(read_plan(fused, Degrees(tp=2, **degrees)).dims, 1)

    assert split(ep=2, etp=2, dp_shard=8) == [*heads, *hidden, *rows, *rest]
    whole = [rows[0].replace(" / tp 28", " 56"), rows[1]]
    assert split(ep=2, dp_shard=2, cp=2) == [*heads, *whole, *rest]
    assert split(ep=2, dp_shard=2) == [*heads, *rest]
    assert split(dp_shard=8) == [*heads, *hidden, *rest]


def test_the_children_of_a_module_are_looked_up_where_torch_keeps_them() -> None:
    def module(**children: Any) -> Any:
        return SimpleNamespace(_modules=children)

    def linear(size: int) -> Any:
        return SimpleNamespace(_modules={}, out_features=size)

    layer = module(attention=None, feed_forward=module(w1=linear(66)))
    experts = SimpleNamespace(_parameters={"w1": SimpleNamespace(shape=(4, 36, 64))}, use_grouped_mm=True)
    moe = module(attention=None, moe=module(shared_experts=module(w1=linear(34)), experts=experts))
    model = SimpleNamespace(model_args=model_args(8, 8, n_layers=3), layers={"1": layer, "2": moe})
    dims = told(read_plan(model).dims, 3)
    assert dims[2:] == [
        "TP005 feed_forward_hidden_dim 66: even, in layer 1 (1 of 3)",
        "TP010 shared_expert_hidden_dim 34: even, in layer 2 (1 of 3)",
        "TP013 expert_hidden_dim 36: aligned, in layer 2 (1 of 3)",
    ]


def test_a_layer_without_feed_forward_does_not_hide_another_ones() -> None:
    mlp = SimpleNamespace(w1=SimpleNamespace(out_features=64))
    layers = {"0": SimpleNamespace(feed_forward=mlp), "1": SimpleNamespace()}
    plan = read_plan(
        SimpleNamespace(model_args=model_args(vocab_size=0), layers=layers), Degrees(2, seq_len=8)
    )
    assert plan.not_judged == ("TP006: SimpleNamespace.vocab_size is 0",)
    experts = SimpleNamespace(num_experts=0)
    assert read_plan(model_args(moe_enabled=True, moe_args=experts)).not_judged[-1] == (
        "EP001: SimpleNamespace.moe_args.num_experts is 0"
    )


def test_a_built_layer_that_only_fills_in_what_the_args_leave_out_differs_in_nothing() -> None:
    args = model_args(16, None, n_layers=1)
    model = SimpleNamespace(model_args=args, layers={"0": attention_layer(16, 16)})
    assert read_plan(model).dims == read_plan(args).dims
    broken = SimpleNamespace(model_args=args, layers={"0": attention_layer(0, 16)})
    with pytest.raises(tpv.PlanError) as caught:
        read_plan(broken)
    assert str(caught.value) == (
        "Not validated: layers.0.attention.n_heads must be a positive whole number, got 0."
    )


def test_of_a_model_that_a_function_of_somebodys_own_splits_the_heads_are_judged_alone() -> None:
    mlp = SimpleNamespace(w1=SimpleNamespace(out_features=63))
    model = SimpleNamespace(
        model_args=model_args(8, 2, vocab_size=3), layers={"0": SimpleNamespace(feed_forward=mlp)}
    )
    own = Degrees(tp=2, seq_len=33, by_own_function=True)
    plan = read_plan(model, own)
    assert [(dim.code, dim.size) for dim in plan.dims] == [("TP001", 8), ("TP002", 2)]
    assert plan.not_judged == (
        "all but TP001 and TP002: what else is split, the model's own parallelize function alone knows",
    )
    assert plan.valid_degrees(degrees=own) == [1, 2]
    assert plan.replication_degrees == []
    others = read_plan(model, Degrees(tp=2, seq_len=33)).violations(Degrees(tp=2, seq_len=33))
    assert [dim.code for dim in others] == ["TP009", "TP005"]
