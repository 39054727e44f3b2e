"""How many key-value heads there are, under names that are known and names that are not."""

from __future__ import annotations

import re
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.releases.test_huggingface import config
from torchtitan_tp_validate.releases.huggingface import layer_heads
from torchtitan_tp_validate.releases.key_value_heads import N_KV_HEADS

MHA: dict[str, Any] = {"model_type": "someone_s", "num_attention_heads": 8, "num_hidden_layers": 2}


def kv_heads(**more: Any) -> int:
    (one,) = {heads["TP002"] for heads in layer_heads({**MHA, **more})}
    return one


@pytest.mark.parametrize("name", N_KV_HEADS)
def test_every_known_name_is_read(name: str) -> None:
    assert kv_heads(**{name: 2}) == 2
    assert kv_heads(**{name: [2, 2]}) == 2


@pytest.mark.parametrize("name", ["n_shared_head", "proj_groups"])
def test_a_number_of_query_heads_that_share_one_is_divided_by(name: str) -> None:
    assert kv_heads(**{name: 4}) == 2
    assert kv_heads(**{name: 1}) == 8
    with pytest.raises(tpv.PlanError) as caught:
        kv_heads(**{name: 3})
    assert str(caught.value) == (
        f"Not validated: {name} (3) query heads share a key-value head, which does not divide "
        "num_attention_heads (8): correct the config."
    )


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"attention_head_type": "multiquery"}, 1),
        ({"attention_head_type": "multihead"}, 8),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, 1),
        ({"attn_config": {"attn_type": "multihead_attention"}}, 8),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 4}}, 4),
        ({"group_query_attention": True, "num_query_groups": 4}, 4),
        ({"group_query_attention": False, "num_query_groups": 4}, 8),
        ({"use_mla": False, "kv_lora_rank": 512, "num_key_value_heads": 4}, 4),
    ],
)
def test_a_switch_says_how_heads_are_shared(how: dict[str, Any], expected: int) -> None:
    assert kv_heads(**how) == expected


def test_a_latent_rank_counts_unless_the_config_switches_it_off() -> None:
    for use in ({}, {"use_mla": True}, {"use_mla": None}):
        assert layer_heads(config(8, 8, kv_lora_rank=4, **use)) == ({"TP001": 8},) * 2
    assert layer_heads(config(8, 8, kv_lora_rank=4, use_mla=False)) == ({"TP001": 8, "TP002": 8},) * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_gqa_groups", 2),
        ("attention_groups", 2),
        ("head_groups", 2),
        ("kv_heads", 2),
        ("n_kv", 2),
        ("num_heads_kv", 2),
        ("key_value_head_count", [2, 2]),
        ("num_key_value_groups", 4),
        ("n_head_shared_kv", 2),
        ("num_shared_heads", 2),
        ("heads_per_group", 4),
        ("multi_query_groups", 2),
        ("use_gqa", True),
        ("use_mqa", True),
        ("attention_type", "multi_query"),
        ("attn_type", "gqa"),
        ("group_query_attention", True),
        ("NumKVHeads", 2),
    ],
)
def test_an_unknown_name_that_looks_like_shared_heads_is_not_validated(name: str, value: Any) -> None:
    with pytest.raises(tpv.PlanError) as caught:
        tpv.validate_tp_compat({**MHA, name: value}, 2)
    assert str(caught.value) == (
        f"Not validated: {name} ({value!r}) looks like a number of shared key-value heads, under a name "
        "that is not known. Set num_key_value_heads to what the model has."
    )
    # It is asked for where nothing else tells the number.
    assert kv_heads(num_key_value_heads=4, **{name: value}) == 4


def test_settings_of_attention_in_a_group_of_their_own_are_looked_into() -> None:
    with pytest.raises(tpv.PlanError, match=re.escape("attention.num_gqa_groups (2) looks like")):
        layer_heads({**MHA, "attention": {"num_gqa_groups": 2}})
    with pytest.raises(tpv.PlanError, match=re.escape("attn_config.attn_type ('grouped_query_attention')")):
        layer_heads({**MHA, "attn_config": {"attn_type": "grouped_query_attention"}})
    for name in ("num_key_value_heads", "n_shared_head"):  # known, but not there
        with pytest.raises(tpv.PlanError, match=re.escape(f"attention.{name} (2) looks like")):
            layer_heads({**MHA, "attention": {name: 2}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_channels", 128),
        ("d_kv", 64),
        ("kv_lora_dim", 512),
        ("kv_cache_dtype", "fp8"),
        ("num_kv_cache_blocks", 16),
        ("kv_quant_bits", 8),
        ("qkv_bias", True),
        ("clip_qkv", 8),
        ("n_group", 8),
        ("topk_group", 4),
        ("n_groups", 8),
        ("num_groups", 8),
        ("mamba_n_groups", 8),
        ("num_expert_groups", 8),
        ("group_norm_size", 8),
        ("num_hidden_groups", 1),
        ("inner_group_num", 1),
        ("num_kv_shared_layers", 20),
        ("vision_kv_heads", 4),
        ("quantization_config", {"kv_cache_scheme": {"num_bits": 8}, "group_size": 32}),
        ("n_shared_experts", 2),
        ("use_gqa", False),
        ("num_gqa_groups", None),
        ("attention_type", "full"),
    ],
)
def test_a_name_of_something_else_raises_no_alarm(name: str, value: Any) -> None:
    assert kv_heads(**{name: value}) == 8


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(2, 8), (8, 3), (12, 8)])
def test_key_value_heads_that_do_not_divide_the_query_heads_are_an_error_of_the_config(
    n_heads: int, n_kv_heads: int
) -> None:
    with pytest.raises(tpv.PlanError) as caught:
        tpv.validate_tp_compat(config(n_heads, n_kv_heads), 2)
    assert str(caught.value) == (
        f"Not validated: layer 0 has {n_heads} query heads and {n_kv_heads} key-value heads, which do not "
        "divide them. No model can have that: one of the two numbers in the config is wrong."
    )


def test_the_layer_whose_heads_do_not_divide_is_named() -> None:
    with pytest.raises(tpv.PlanError, match="layer 1 has 8 query heads and 3 key-value heads"):
        layer_heads(config(8, [4, 3]))
    # Latent attention has no key-value heads, whatever the file says.
    for unread in (3, 0):
        assert layer_heads(config(8, unread, kv_lora_rank=4)) == ({"TP001": 8},) * 2


def test_a_default_that_was_left_out_is_told_by_what_else_was() -> None:
    nested = {"num_attention_heads": 8, "num_hidden_layers": 1}
    for written in ("initializer_range", "layer_norm_eps", "rms_norm_eps"):
        assert layer_heads({"text_config": {**nested, written: 0.1}}) == ({"TP001": 8, "TP002": 8},)
    with pytest.raises(tpv.PlanError) as caught:
        layer_heads({"text_config": {**nested, "tokens": 7}})
    assert str(caught.value) == (
        "Not validated: text_config.num_key_value_heads is left out, as older transformers does with what "
        "equals the class's default: save the config again, or set it."
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"multi_query_attention": True, "multi_query_group_num": 0},
            "multi_query_group_num must be a positive",
        ),
        (
            {"attn_config": {"kv_n_heads": 0}},
            "attn_config.kv_n_heads must be a positive whole number, got 0.",
        ),
        ({"n_shared_head": 0}, "n_shared_head must be a positive whole number, got 0."),
        (
            {"n_shared_head": 3},
            "n_shared_head (3) query heads share a key-value head, which does not divide "
            "num_attention_heads (8): correct the config.",
        ),
        (
            {"num_attention_heads_per_layer": [6, 8], "num_hidden_layers": 2, "n_shared_head": 3},
            "n_shared_head (3) query heads share a key-value head, which does not divide "
            "num_attention_heads (8): correct the config.",
        ),
        # What comes before and what is of another kind hides nothing.
        ({7: 2, "use_gqa": True}, "use_gqa (True) looks like a number of shared key-value heads"),
        ({"num_kv_heads": None, "use_gqa": True}, "use_gqa (True) looks like a number of shared"),
        ({"rope": {"kv_heads": 2}, "use_gqa": True}, "use_gqa (True) looks like a number of shared"),
    ],
)
def test_a_number_of_key_value_heads_that_is_none_is_named(more: dict[Any, Any], message: str) -> None:
    with pytest.raises(tpv.PlanError, match=f"^{re.escape(f'Not validated: {message}')}"):
        layer_heads({**MHA, **more})


def test_multi_query_attention_without_a_number_of_groups_has_one() -> None:
    assert kv_heads(multi_query_attention=True) == 1
    assert kv_heads(multi_query_attention=False, multi_query_group_num=2) == 8
