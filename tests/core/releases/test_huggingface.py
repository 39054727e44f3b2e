"""Hugging Face configs as data."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.releases import read_plan
from torchtitan_tp_validate.releases.huggingface import Framework, layer_heads, read

TEXT = """\
Tensor parallel degree (4) must divide num_key_value_heads (2). For qwen3_5_moe, max supported TP is 2.

  TP002 num_key_value_heads = 2 is not a multiple of 4, in layer 3 (1 of 4):
        wk and wv are split by columns, so that every rank computes whole key-value heads.

Without this check: the model loads without a word, and its first forward pass dies in attention with
  "shape '[...]' is invalid for input of size ...".
Degrees that work: 1, 2.
To change it: tp_size=2, as in from_pretrained(...,
  distributed_config=DistributedConfig(tp_size=2))"""


def config(n_heads: Any = 8, n_kv_heads: Any = 2, n_layers: Any = 2, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "num_hidden_layers": n_layers,
        **more,
    }


def qwen3_5() -> dict[str, Any]:
    text = config(
        16,
        2,
        4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_key_heads=6,
        linear_num_value_heads=12,
    )
    return {"model_type": "qwen3_5_moe", "text_config": text}


def plan(content: dict[str, Any], framework: Framework = Framework.TRANSFORMERS, **more: Any) -> Plan:
    return read(content, content, Degrees(tp=1), framework=framework, **more)


def sizes(the_plan: Plan) -> dict[str, int]:
    return {dim.code: dim.size for dim in the_plan.dims}


def test_the_full_text_names_what_hugging_face_names() -> None:
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(qwen3_5(), 4)
    assert str(caught.value) == TEXT


def test_torchtitan_splits_every_kind_of_head_and_transformers_two() -> None:
    assert sizes(plan(qwen3_5())) == {"TP001": 16, "TP002": 2}
    assert sizes(plan(qwen3_5(), Framework.TORCHTITAN)) == {
        "TP001": 16,
        "TP002": 2,
        "TP003": 6,
        "TP004": 12,
    }
    assert "--parallelism.{flag} {degree}" in plan(qwen3_5(), Framework.TORCHTITAN).how_to_change


@pytest.mark.parametrize(
    ("tp_plan", "split"),
    [
        (
            {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.k_proj": "colwise"},
            {"TP001", "TP002"},
        ),
        ({"layers.*.self_attn.q_proj": "colwise"}, {"TP001"}),
        ({"layers.*.self_attn.v_proj": "colwise"}, {"TP002"}),
        ({"layers.*.self_attn.k_proj": "colwise_gather_output"}, set()),
        ({"layers.*.attention.query_key_value": "colwise"}, {"TP001", "TP002"}),
        ({"layers.*.self_attn.q_b_proj": "colwise", "layers.*.self_attn.kv_b_proj": "colwise"}, {"TP001"}),
        ({"layers.*.mlp.q_proj": "colwise", "layers.*.self_attn.v_proj": "colwise"}, {"TP002"}),
        ({"layers.*.linear_attn.q_proj": "colwise", "layers.*.mlp.up_proj": "colwise"}, set()),
        ({}, set()),
    ],
)
def test_transformers_own_plan_decides_what_is_split(tp_plan: dict[str, str], split: set[str]) -> None:
    assert set(sizes(plan(config(), tp_plan=tp_plan))) == split


LINEAR = ["linear_attention", "full_attention"]

KV_HEADS: list[tuple[dict[str, Any], int, int | None]] = [
    ({"num_attention_heads": 8, "num_hidden_layers": 2}, 8, 8),
    ({"num_attention_heads": 8, "num_key_value_heads": None, "num_hidden_layers": 2}, 8, 8),
    ({"n_head": 8, "n_layer": 2}, 8, 8),
    ({"n_heads": 8, "n_layers": 2, "attn_config": {"kv_n_heads": 2}}, 8, 2),  # dbrx
    ({"num_heads": 8, "num_layers": 2}, 8, 8),
    ({"n_head": 8, "n_layer": 2, "multi_query": True}, 8, 1),  # gpt_bigcode
    ({"n_head": 8, "n_layer": 2, "multi_query": False}, 8, 8),
    # Falcon: 7B, 40B, and the old one without groups
    ({"num_attention_heads": 71, "num_hidden_layers": 2, "num_kv_heads": 71, "multi_query": True}, 71, 1),
    (
        {
            "num_attention_heads": 128,
            "num_hidden_layers": 2,
            "num_kv_heads": 8,
            "multi_query": True,
            "new_decoder_architecture": True,
        },
        128,
        8,
    ),
    ({"num_attention_heads": 64, "num_hidden_layers": 2, "multi_query": False}, 64, 64),
    # ChatGLM
    (
        {
            "num_attention_heads": 32,
            "num_layers": 2,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
        },
        32,
        2,
    ),
    (
        {
            "num_attention_heads": 32,
            "num_layers": 2,
            "multi_query_attention": False,
            "multi_query_group_num": 2,
        },
        32,
        32,
    ),
    # latent attention: query heads alone
    (config(16, 16, kv_lora_rank=512), 16, None),
    # encoder-decoders have a decoder's own
    ({"encoder_attention_heads": 4, "decoder_attention_heads": 8, "decoder_layers": 2}, 8, 8),
    (config(32, 8, layer_types=["sliding_attention"] * 2, swa_num_key_value_heads=4), 32, 4),  # inkling
]


@pytest.mark.parametrize(("content", "n_heads", "n_kv_heads"), KV_HEADS)
def test_head_counts_by_every_name(content: dict[str, Any], n_heads: int, n_kv_heads: int | None) -> None:
    heads = {"TP001": n_heads} if n_kv_heads is None else {"TP001": n_heads, "TP002": n_kv_heads}
    assert layer_heads({"model_type": "any", **content}) == (heads, heads)


def kv_heads(content: dict[str, Any]) -> list[int | None]:
    return [heads.get("TP002") for heads in layer_heads(content)]


def test_layers_that_differ_are_read_one_by_one() -> None:
    types = ["sliding_attention", "full_attention"]
    gemma4 = config(8, 4, layer_types=types, num_global_key_value_heads=2, attention_k_eq_v=True)
    assert kv_heads(gemma4) == [4, 2]
    assert kv_heads({**gemma4, "attention_k_eq_v": False}) == [4, 4]
    assert kv_heads(config(8, 4, layer_types=types, num_global_key_value_heads=2)) == [4, 2]
    assert kv_heads({**gemma4, "per_layer_config": {"00": {"num_key_value_heads": 1}}}) == [1, 2]
    assert kv_heads(config(8, [4, 2])) == [4, 2]  # OpenELM
    assert kv_heads({"num_attention_heads": 8, "layer_types": types}) == [8, 8]
    laguna = config(8, 4, num_attention_heads_per_layer=[16, 8])
    assert [heads["TP001"] for heads in layer_heads(laguna)] == [16, 8]
    deci = {
        "num_attention_heads": 32,
        "block_configs": [
            {"attention": {"n_heads_in_group": 8}},
            {"attention": {"no_op": True}},
            {"attention": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 16}},
        ],
    }
    assert layer_heads(deci) == ({"TP001": 32, "TP002": 4}, {}, {}, {"TP001": 32, "TP002": 2})
    wider = {"00": {"num_attention_heads": 16}, "1": {"num_key_value_heads": 8}}
    assert layer_heads(config(8, 4, per_layer_config=wider)) == (
        {"TP001": 16, "TP002": 4},
        {"TP001": 8, "TP002": 8},
    )


OF_A_MIXER = ("mamba_n_heads", "n_mamba_heads", "ssm_heads")


@pytest.mark.parametrize(
    "how",
    [
        {"layer_types": ["mamba", "full_attention", "mamba", "full_attention"]},
        {"layers_block_type": ["moe", "attention", "mamba", "hybrid"]},
        {"block_types": ["recurrent", "attention"]},
        {"hybrid_override_pattern": "M*E*"},
        {"attn_layer_period": 2, "attn_layer_offset": 1},
        {"layer_types": ["moe", "sparse"] * 2},
        *({"layer_types": ["linear_attention", "full_attention"] * 2, name: 6} for name in OF_A_MIXER),
    ],
)
def test_layers_without_attention_impose_nothing(how: dict[str, Any]) -> None:
    read_layers = layer_heads(config(8, 2, 4, **how))
    assert [bool(heads) for heads in read_layers] == [False, True, False, True]
    from_the_first = layer_heads(config(8, 2, 4, attn_layer_period=3))
    assert [bool(heads) for heads in from_the_first] == [True, False, False, True]


@pytest.mark.parametrize(
    "how",
    [
        {"full_attention_interval": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 6},
        {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4}
        | {"linear_num_value_heads": 6},
    ],
)
def test_linear_attention_has_heads_of_its_own(how: dict[str, Any]) -> None:
    assert layer_heads(config(**how)) == ({"TP003": 4, "TP004": 6}, {"TP001": 8, "TP002": 2})


def test_positions_say_which_layers_of_a_hyena_attend() -> None:
    heads = {"TP001": 8, "TP002": 2}
    assert layer_heads(config(n_layers=3, attn_layer_idxs=[1])) == ({}, heads, {})


def test_one_number_for_both_kinds_of_linear_heads() -> None:
    kimi = {"full_attn_layers": [2], "kda_layers": [1], "num_heads": 4}
    expected = ({"TP003": 4, "TP004": 4}, {"TP001": 8})
    assert layer_heads(config(kv_lora_rank=512, linear_attn_config=kimi)) == expected
    types = ["linear_attention", "full_attention"]
    assert layer_heads(config(kv_lora_rank=512, layer_types=types, linear_num_heads=4)) == expected


def test_linear_attention_without_numbers_of_its_own_has_the_models() -> None:
    for how in ({"layer_types": LINEAR}, {"attn_type_list": [0, 1]}):  # MiniMax
        assert layer_heads(config(8, 2, **how)) == ({"TP001": 8}, {"TP001": 8, "TP002": 2})
    # An offset is of the other kind of period.
    every_third = layer_heads(config(8, 2, 3, full_attention_interval=3, attn_layer_offset=1))
    assert every_third == ({"TP001": 8}, {"TP001": 8}, {"TP001": 8, "TP002": 2})


def test_a_pattern_of_numbers_says_which_layers_slide() -> None:
    mimo = config(64, 4, hybrid_layer_pattern=[0, 1], swa_num_key_value_heads=8)
    assert layer_heads(mimo) == ({"TP001": 64, "TP002": 4}, {"TP001": 64, "TP002": 8})


def test_the_types_of_layers_may_go_on_over_those_that_predict_more_tokens() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    other = {"num_attention_heads": 12, "num_attention_groups": 4}
    step = config(8, 2, 2, layer_types=types, num_nextn_predict_layers=1, attention_other_setting=other)
    assert layer_heads(step) == ({"TP001": 8, "TP002": 2}, {"TP001": 12, "TP002": 4})
    with pytest.raises(tpv.PlanError, match="layer_types names 3 layers, and num_hidden_layers is 2"):
        layer_heads({**step, "num_nextn_predict_layers": 2})


def test_a_hybrid_of_linear_attention_has_both_kinds_of_heads() -> None:
    fla = {"model_type": "gla", "num_heads": 4, "num_hidden_layers": 2}
    with_values = {**fla, "num_v_heads": 8, "attn": {"layers": [1], "num_heads": 16}}
    assert layer_heads(with_values) == ({"TP003": 4, "TP004": 8}, {"TP001": 16, "TP002": 16})
    of_keys = {**fla, "num_kv_heads": 2, "attn": {"layers": [1], "num_heads": 16}}
    assert layer_heads(of_keys)[0] == {"TP003": 4, "TP004": 2}
    state_space = {**fla, "model_type": "mamba2", "attn": {"layers": [0], "num_heads": 16, "num_kv_heads": 2}}
    assert layer_heads(state_space) == ({"TP001": 16, "TP002": 2}, {})


def test_every_text_decoder_of_a_config_counts() -> None:
    blt = {"decoder_config": config(8, 4, 1), "global_config": config(16, 2, 1), "model_type": "blt"}
    assert kv_heads(blt) == [4, 2]
    assert kv_heads({"thinker_config": {"text_config": config(8, 2, 1)}}) == [2]


DEFAULTS_LEFT_OUT = "num_key_value_heads is left out, as older transformers does with what equals"


FLA = {"model_type": "gla", "num_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "bert"}, "the config has no num_attention_heads (nor n_head"),
        (
            config(linear_attn_config={"full_attn_layers": "abc"}),
            "linear_attn_config.full_attn_layers must be a list of layer numbers, got 'abc'.",
        ),
        (
            config(full_attention_interval="4"),
            "full_attention_interval must be a positive whole number, got '4'",
        ),
        (config(attn_layer_period=[8]), "attn_layer_period must be a positive whole number, got [8]."),
        (config(attn_layer_idxs=3), "attn_layer_idxs must be a list of layer numbers, got 3."),
        (config(hybrid_layer_pattern="01"), "hybrid_layer_pattern must be a list of 0 and 1, got '01'."),
        (config(hybrid_layer_pattern=[0, 2]), "hybrid_layer_pattern must be a list of 0 and 1, got [0, 2]."),
        (config(hybrid_layer_pattern=[0]), "hybrid_layer_pattern counts 1 layers, but the model has 2."),
        (config(attn={"layers": "1"}), "attn.layers must be a list of layer numbers, got '1'."),
        (config(attn={"layers": [1]}), "attn.num_heads must be a positive whole number, got None."),
        (
            config(attention_other_setting={"num_attention_heads": 96}),
            "the config has attention_other_setting for some of its layers, but no layer_types that says for",
        ),
        (
            {"text_config": {"model_type": "llama"}, "model_type": "llava"},
            "the config has no text_config.num_attention_heads",
        ),
        (config(n_heads="8"), "num_attention_heads must be a positive whole number, got '8'."),
        (config(n_heads=True), "num_attention_heads must be a positive whole number, got True."),
        (config(n_heads=10**9), "num_attention_heads must be at most 1000000, got 1000000000."),
        (config(n_kv_heads=0), "num_key_value_heads must be a positive whole number, got 0."),
        (config(n_kv_heads=[2]), "num_key_value_heads counts 1 layers, but the model has 2."),
        (config(n_kv_heads=[2, None]), "num_key_value_heads[1] must be a positive whole number, got None."),
        (config(n_layers=10**9), "num_hidden_layers must be at most 10000, got 1000000000."),
        (config(n_layers=None), "num_hidden_layers must be a positive whole number, got None."),
        (config(layer_types=["full_attention"]), "layer_types names 1 layers, and num_hidden_layers is 2."),
        (config(layer_types=["full_attention", "warp"]), "layer 1 is of unknown type 'warp'."),
        (config(layer_types=[1, 2]), "layer_types must be a list of names, got [1, 2]."),
        (config(layer_types=[]), "layer_types must be a list of names, got []."),
        (
            config(linear_num_key_heads=4),
            "the config has linear_num_key_heads for some of its layers, but no layer_types",
        ),
        (config(swa_num_key_value_heads=4), "the config has swa_num_key_value_heads for some of its layers"),
        (config(linear_num_heads=4), "the config has linear_num_heads for some of its layers"),
        (config(linear_attn_config={}), "the config has linear_attn_config for some of its layers"),
        (config(layer_types=["conv"] * 2), "no layer of llama has attention heads."),
        (
            config(per_layer_config={"x": {}}),
            "a key of per_layer_config is no layer: \"invalid literal for int() with base 10: 'x'\".",
        ),
        (
            config(per_layer_config={"1": {"num_attention_heads": 0}}),
            "per_layer_config[1] must be a positive whole number, got 0.",
        ),
        (
            config(per_layer_config={"1": {"num_key_value_heads": 0}}),
            "per_layer_config[1] must be a positive whole number, got 0.",
        ),
        (
            config(layer_types=LINEAR, linear_num_heads=0),
            "linear_num_heads must be a positive whole number, got 0.",
        ),
        (
            config(layer_types=LINEAR, linear_num_key_heads=0),
            "linear_num_key_heads must be a positive whole number, got 0.",
        ),
        (
            config(layer_types=LINEAR, linear_num_key_heads=2),
            "linear_num_value_heads must be a positive whole number, got None.",
        ),
        (
            config(layer_types=LINEAR, num_global_key_value_heads=0),
            "num_global_key_value_heads must be a pos",
        ),
        (config(layer_types=LINEAR, swa_num_attention_heads=0), "swa_num_attention_heads must be a positive"),
        (config(layer_types=LINEAR, swa_num_key_value_heads=0), "swa_num_key_value_heads must be a positive"),
        (
            config(layer_types=LINEAR, attention_other_setting={"num_attention_heads": 0}),
            "attention_other_setting.num_attention_heads must be a positive whole number, got 0.",
        ),
        (
            config(layer_types=LINEAR, attention_other_setting={"num_attention_groups": 0}),
            "attention_other_setting.num_attention_groups must be a positive whole number, got 0.",
        ),
        (
            config(n_layers=0, attn_layer_idxs=[0]),
            "num_hidden_layers must be a positive whole number, got 0.",
        ),
        (config(n_layers=0, hybrid_layer_pattern=[0]), "num_hidden_layers must be a positive whole number"),
        (config(n_layers=0, layer_types=LINEAR), "num_hidden_layers must be a positive whole number, got 0."),
        (config(n_layers=0, full_attention_interval=2), "num_hidden_layers must be a positive whole number"),
        (
            config(n_layers=0, linear_attn_config={"full_attn_layers": [1]}),
            "num_hidden_layers must be a positive whole number, got 0.",
        ),
        (
            config(n_layers=0, attn={"layers": [1]}),
            "num_hidden_layers must be a positive whole number, got 0",
        ),
        (
            {**FLA, "attn": {"layers": [1], "num_heads": 8, "num_kv_heads": -1}},
            "attn.num_kv_heads must be a pos",
        ),
        (
            {**FLA, "attn": {"layers": [1], "num_heads": 8, "num_kv_heads": 3}},
            "attn has 8 query heads and 3 key-value heads, which do not divide them.",
        ),
        (
            {**FLA, "num_heads": 0, "attn": {"layers": [1], "num_heads": 8}},
            "num_heads must be a positive whole",
        ),
        (
            {**FLA, "num_v_heads": -1, "attn": {"layers": [1], "num_heads": 8}},
            "num_v_heads must be a positive",
        ),
        ({"block_configs": [{}], "model_type": "any"}, "num_attention_heads must be a positive whole number"),
        (
            {"num_attention_heads": 0, "block_configs": []},
            "num_attention_heads must be a positive whole number",
        ),
        ({"num_attention_heads": 8, "block_configs": [None]}, "block_configs[0].attention is missing."),
        (
            {"num_attention_heads": 8, "block_configs": [{"attention": {"n_heads_in_group": 0}}]},
            "block_configs[0].attention.n_heads_in_group must be a positive whole number, got 0.",
        ),
        (
            {"num_attention_heads": 8, "block_configs": [{"attention": {"n_heads_in_group": 16}}]},
            "block_configs[0].attention must be a positive whole number, got 0.",
        ),
        (
            {"model_type": "any", "state_size": 16},
            "any is a state-space model, which has no attention heads.",
        ),
        (
            {"model_type": "any", "ssm_cfg": {}, "attn_layer_idx": [1]},
            "the config has no num_attention_heads (nor n_head, n_heads, num_heads).",
        ),
        (config(per_layer_config=[1]), "per_layer_config must map layers to their settings, got [1]."),
        ({"model_type": "mamba2", "num_heads": 8, "num_hidden_layers": 2}, "mamba2 has no attention heads."),
        ({"num_attention_heads": 8, "block_configs": [{}]}, "block_configs[0].attention is missing."),
        (
            {"text_config": {"num_attention_heads": 96, "num_hidden_layers": 2}, "model_type": "llava"},
            f"text_config.{DEFAULTS_LEFT_OUT}",
        ),
    ],
)
def test_what_cannot_be_interpreted_is_not_validated(content: dict[str, Any], message: str) -> None:
    with pytest.raises(tpv.PlanError, match=f"^{re.escape(f'Not validated: {message}')}"):
        tpv.validate_tp_compat(content, 2)


def test_a_config_object_and_a_model_are_read_by_their_shape() -> None:
    as_object = SimpleNamespace(model_type="llama", to_dict=config)
    for found in (as_object, SimpleNamespace(config=as_object)):
        assert tpv.valid_tp_degrees(found) == [1, 2]
    # dbrx and others use torchtitan's names
    content = {"model_type": "llama", "n_heads": 8, "n_layers": 2, "attn_config": {"kv_n_heads": 4}}
    as_object = SimpleNamespace(n_heads=8, n_layers=2, model_type="llama", to_dict=lambda: content)
    assert read_plan(as_object).model == "llama"
    # What is no such object is read by the names that it has.
    for other in ({"model_type": "llama"}, {"to_dict": dict}):
        assert read_plan(SimpleNamespace(n_heads=8, n_layers=2, **other)).model == "SimpleNamespace"
    with_plan = SimpleNamespace(config=as_object, tp_plan={"layers.*.self_attn.q_proj": "colwise"})
    assert tpv.valid_tp_degrees(with_plan) == [1, 2, 4, 8]
    assert tpv.valid_tp_degrees(as_object) == [1, 2, 4]


def test_decoders_within_decoders_end_somewhere() -> None:
    content = config(8, 2, 1)
    for _ in range(9):
        content = {"decoder": content}
    assert kv_heads(content["decoder"]) == [2]
    with pytest.raises(tpv.PlanError) as caught:
        layer_heads({"decoder": content})
    assert str(caught.value).startswith("Not validated: 'decoder.decoder.")
    assert str(caught.value).endswith(" is nested too deeply.")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a", "a"), ("a" * 60, "a" * 60), ("a" * 61, "this model"), ("", "this model"), (7, "this model")],
)
def test_a_model_type_that_is_no_name_is_not_shown(name: Any, shown: str) -> None:
    assert plan(config(model_type=name), tp_plan={}).model == shown


def test_where_nothing_is_split_the_degrees_up_to_the_number_of_heads_stand_for_all() -> None:
    assert plan(config(8), tp_plan={}).valid_degrees() == list(range(1, 9))
    only_linear = config(layer_types=["linear_attention"] * 2, linear_num_heads=4)
    assert plan(only_linear, tp_plan={}).valid_degrees() == [1]
    assert plan(config()).how_to_replicate == ""
