"""What is judged of a config.json beside the heads of its text decoder, and what the verdict leaves out."""

from __future__ import annotations

from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.releases.published import PUBLISHED
from tests.core.shapes import told
from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.releases.huggingface import Framework, read
from torchtitan_tp_validate.validate import compat_error

DTENSOR = "partial_dtensor"


def plan(config: dict[str, Any], framework: Framework = Framework.TORCHTITAN, **degrees: Any) -> Plan:
    return read(config, config, Degrees(**{"tp": 1, **degrees}), framework=framework)


def llama(**more: Any) -> dict[str, Any]:
    """A whole file: 8 query and 2 key-value heads."""
    sizes = {"intermediate_size": 64, "vocab_size": 128, "hidden_size": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return {"model_type": "llama", **heads, **sizes, **more}


def moe(**more: Any) -> dict[str, Any]:
    return llama(model_type="qwen3_moe", num_experts=8, moe_intermediate_size=64, **more)


def sizes(the_plan: Plan, *codes: str) -> list[int]:
    return [dim.size for dim in the_plan.dims if dim.code in codes]


def test_a_whole_file_leaves_nothing_out() -> None:
    assert plan(llama()).not_judged == ()
    assert plan(llama(), Framework.TRANSFORMERS).not_judged == ()
    for name in ("Kimi-K2.5", "Qwen3.5-35B-A3B", "DeepSeek-V3", "gpt-oss-20b", "Qwen3-30B-A3B"):
        assert plan(PUBLISHED[name].config).not_judged == (), name


# Experts, by expert parallelism.


@pytest.mark.parametrize(
    "name", ["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_routed_experts"]
)
def test_experts_are_judged_by_expert_parallelism_in_any_family(name: str) -> None:
    config = {**llama(model_type="of_someone"), name: 12}
    assert plan(config, ep=4).valid_degrees(Axis.EP) == [1, 2, 3, 4, 6, 12]
    assert sizes(plan(config), "EP001") == []
    error = compat_error(plan(config, ep=8), Degrees(tp=2, ep=8))
    assert error is not None
    assert str(error).startswith(
        f"Expert parallel degree (8) must divide {name} (12). For of_someone, max supported EP is 12.\n\n"
        f"  EP001 {name} = 12 is not a multiple of 8, in the config:\n"
    )


def test_a_dense_model_under_expert_parallelism_says_that_it_has_no_experts() -> None:
    for dense in ({}, {"num_experts": 0}, {"num_local_experts": 1}, {"num_experts": None}):
        assert plan(llama(**dense), ep=7).not_judged == ("EP001: the config has no number of experts",)


def test_nested_experts_are_found_where_they_are() -> None:
    error = compat_error(plan(PUBLISHED["Kimi-K2.5"].config, ep=7), Degrees(tp=4, ep=7))
    assert error is not None
    assert "EP001 n_routed_experts = 384 is not a multiple of 7, in text_config:" in str(error)


def test_whole_experts_are_split_in_place_of_their_rows() -> None:
    uneven = moe() | {"moe_intermediate_size": 60}
    assert sizes(plan(uneven), "TP011") == [60]
    assert sizes(plan(uneven, ep=2), "TP011", "TP013") == []


# The sequence, by tensor and context parallelism.


@pytest.mark.parametrize(
    ("degrees", "fits"),
    [
        ({"tp": 2, "seq_len": 4096}, True),
        ({"tp": 2, "seq_len": 4095}, False),
        ({"tp": 2, "seq_len": 6, "cp": 2}, False),
        ({"tp": 2, "seq_len": 8, "cp": 2}, True),
        ({"tp": 2, "seq_len": 4095, "spmd_backend": DTENSOR}, True),
    ],
)
def test_the_sequence_is_split_over_tensor_and_twice_over_context_parallel_ranks(
    degrees: dict[str, Any], fits: bool
) -> None:
    assert (compat_error(plan(llama(), **degrees), Degrees(**degrees)) is None) is fits


def test_context_parallelism_without_a_sequence_length_says_so() -> None:
    assert plan(llama(), cp=2).not_judged == (
        "TP009: no seq_len was given to be split over 2 context parallel ranks",
    )
    assert plan(llama(), cp=2, seq_len=64).not_judged == ()


# Shared key-value heads.


def test_ranks_may_share_a_key_value_head_where_torchtitan_has_the_model() -> None:
    assert plan(llama()).valid_degrees() == [1, 2]
    assert plan(llama()).replication_degrees == [4, 8]
    assert plan(PUBLISHED["Qwen3.5-9B"].config).replication_degrees == [8, 16]  # its first layers are linear
    assert plan(llama(), replicate_kv_heads=True).valid_degrees() == [1, 2, 4, 8]
    error = compat_error(plan(llama()), Degrees(tp=4))
    assert error is not None
    assert "KV-head replication (--replicate-kv-heads) adds: 4, 8." in str(error)


@pytest.mark.parametrize("config", [llama(model_type="mistral"), PUBLISHED["DeepSeek-V3"].config])
def test_they_may_not_where_it_has_none_or_has_latent_attention(config: dict[str, Any]) -> None:
    assert plan(config, replicate_kv_heads=True).dims == plan(config).dims
    assert plan(config).replication_degrees == []


def test_a_head_dimension_is_read_or_follows_from_the_hidden_size() -> None:
    assert sizes(plan(llama(), replicate_kv_heads=True), "TP014") == [2 * 4]
    assert sizes(plan(llama(head_dim=16), replicate_kv_heads=True), "TP014") == [2 * 16]
    without = llama() | {"hidden_size": None}
    assert plan(without, replicate_kv_heads=True).valid_degrees() == [1, 2]


# Sizes that torchtitan's own model of a family splits.


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (llama() | {"intermediate_size": 63}, "TP005"),
        (llama() | {"vocab_size": 127}, "TP006"),
        (moe() | {"moe_intermediate_size": 63}, "TP011"),
        (moe() | {"moe_intermediate_size": 8}, "TP013"),
        (moe(shared_expert_intermediate_size=63), "TP010"),
        (moe(n_shared_experts=3) | {"moe_intermediate_size": 21}, "TP010"),
        (moe(mlp_only_layers=[0]) | {"intermediate_size": 63}, "TP005"),
        (moe(decoder_sparse_step=2) | {"intermediate_size": 63}, "TP005"),
        (moe(first_k_dense_replace=1) | {"intermediate_size": 63}, "TP005"),
        (llama(model_type="qwen3_5", vision_config={"num_heads": 3}), "TP007"),
        (llama(model_type="qwen3_5", vision_config={"num_heads": 2, "intermediate_size": 63}), "TP008"),
    ],
)
def test_a_size_that_torchtitans_model_splits_must_divide(config: dict[str, Any], code: str) -> None:
    error = compat_error(plan(config), Degrees(tp=2))
    assert error is not None
    assert code in {violation.code for violation in error.violations}
    # A family that torchtitan does not have is judged by its heads.
    assert plan({**config, "model_type": "of_someone"}).valid_degrees() == [1, 2]


def test_a_model_of_experts_alone_has_no_feed_forward_layer() -> None:
    unused = moe(first_k_dense_replace=0, mlp_only_layers=[], decoder_sparse_step=1) | {
        "intermediate_size": 7
    }
    assert plan(unused).valid_degrees() == [1, 2]


def test_behind_dtensor_a_shard_may_be_uneven_but_not_empty() -> None:
    config = llama() | {"intermediate_size": 63, "vocab_size": 127}
    assert plan(config).valid_degrees() == [1]
    assert plan(config, spmd_backend=DTENSOR).valid_degrees() == [1, 2]


def test_the_vision_heads_of_kimi_are_judged_in_every_spelling() -> None:
    k25 = PUBLISHED["Kimi-K2.5"].config
    error = compat_error(plan(k25), Degrees(tp=32))
    assert error is not None
    assert str(error).startswith(
        "Tensor parallel degree (32) must divide vision_config.vt_num_attention_heads (16). "
        "For kimi_k25, max supported TP is 16.\n\n"
        "  TP007 vision_config.vt_num_attention_heads = 16 is not a multiple of 32, in vision_config:\n"
    )
    k3 = {**k25, "model_type": "kimi_k3", "vision_config": {"num_attention_heads": 12}}
    assert plan(k3).valid_degrees() == [1, 2, 4]


def test_what_was_not_looked_at_is_said() -> None:
    other = llama(
        model_type="of_someone", vision_config={"num_heads": 3}, audio_config={"num_attention_heads": 5}
    )
    assert plan(other).not_judged == ("vision_config: not looked at", "audio_config: not looked at")
    assert plan(other).valid_degrees() == [1, 2]
    cogvlm = PUBLISHED["cogvlm2-llama3-chat-19B"].config
    assert plan(cogvlm).not_judged == ("vision_config: not looked at",)
    omni = {"model_type": "omni", "thinker_config": {"text_config": llama(), "vision_config": {"a": 1}}}
    assert plan(omni).not_judged == ("thinker_config.vision_config: not looked at",)
    # A value that is no part of the model is nothing to look at.
    assert plan(llama(model_type="of_someone", vision_start_token_id=7)).not_judged == ()


def test_every_size_is_named_as_the_file_names_it_with_its_place() -> None:
    vision = {"num_heads": 4, "intermediate_size": 60, "hidden_size": 24}
    text = moe(num_experts_per_tok=2, shared_expert_intermediate_size=48, mlp_only_layers=[0])
    nested = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": vision}
    heads = [
        "TP001 num_attention_heads 8: even, in all 2 layers",
        "TP002 num_key_value_heads 2: even, in all 2 layers",
    ]
    dense = ["TP006 vocab_size 128: even, in text_config", "TP005 intermediate_size 64: even, in text_config"]
    shared = "TP010 shared_expert_intermediate_size 48: even, in text_config"
    experts = [
        "TP011 moe_intermediate_size 64: even, in text_config",
        "TP013 expert_hidden_dim 64: aligned, in text_config",
    ]
    seen = ["TP007 vision_config.num_heads 4: even, in vision_config"]
    seen += ["TP008 vision_config.intermediate_size 60: even, in vision_config"]
    assert told(plan(nested, tp=2).dims, 2) == [*heads, *dense, *experts, shared, *seen]
    # Two a side, or one number a side, are merged into one.
    for merged in (2, [2, 2], [2, 2, 3]):
        four = {**nested, "vision_config": {**vision, "spatial_merge_size": merged}}
        (last,) = told(plan(four).dims, 2)[len([*heads, *dense, *experts, shared, *seen]) :]
        assert last == "TP008 vision_config.hidden_size of 4 merged patches 96: even, in vision_config"
    several = moe(n_shared_experts=3) | {"num_experts": [4, 6]}
    assert "TP010 n_shared_experts * moe_intermediate_size 192: even, in the config" in told(
        plan(several).dims, 2
    )
    assert sizes(plan(several, ep=2), "EP001") == [4, 6]
    assert plan(several, ep=2).not_judged == ()


def test_gpt_oss_cuts_both_halves_of_its_experts_in_step() -> None:
    experts = moe() | {"model_type": "gpt_oss"}
    assert told(plan(experts, spmd_backend=DTENSOR).dims, 2)[3:5] == [
        "TP011 moe_intermediate_size 64: not empty, in the config",
        "TP011 moe_intermediate_size 64: in step, in the config",
    ]
    assert "in step" not in str(told(plan(moe(), spmd_backend=DTENSOR).dims, 2))


def test_a_part_is_named_where_its_name_is_one() -> None:
    long = {name: {"a": 1} for name in ("vision_" + "a" * 33, "vision_" + "a" * 34, "vision tower")}
    assert plan(llama(model_type="of_someone", **long)).not_judged == (f"vision_{'a' * 33}: not looked at",)


def test_a_size_that_is_missing_is_named() -> None:
    bare = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    assert plan({"model_type": "llama", **bare}).not_judged == (
        "TP006, TP005: the config has no vocab_size, intermediate_size",
    )
    assert plan({"model_type": "qwen3_moe", **bare, "num_experts": 4}).not_judged == (
        "TP006, TP011: the config has no vocab_size, moe_intermediate_size",
    )
    vlm = llama(model_type="qwen3_5", vision_config={"depth": 2})
    assert plan(vlm).not_judged == ("TP007: vision_config has no number of heads",)


def test_transformers_rule_knows_none_of_the_other_degrees() -> None:
    degrees = Degrees(tp=2, ep=2, cp=2, seq_len=3, replicate_kv_heads=True)
    the_plan = read(moe(), moe(), degrees, framework=Framework.TRANSFORMERS)
    assert the_plan.not_judged == (
        "an expert parallel degree: no part of transformers' rule",
        "a context parallel degree: no part of transformers' rule",
        "a sequence length: no part of transformers' rule",
        "KV-head replication: no part of transformers' rule",
    )
    assert the_plan.dims == plan(moe(), Framework.TRANSFORMERS).dims


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama() | {"vocab_size": "many"}, "vocab_size must be a positive whole number, got 'many'."),
        (llama() | {"intermediate_size": [64, 32]}, "intermediate_size must be a positive whole number, got"),
        (moe() | {"moe_intermediate_size": -1}, "moe_intermediate_size must be a positive whole number"),
        (
            llama(model_type="qwen3_5", vision_config={"num_heads": 0}),
            "vision_config.num_heads must be a positive whole number, got 0.",
        ),
        (
            llama(model_type="qwen3_5", vision_config={"num_heads": 2, "intermediate_size": 0}),
            "vision_config.intermediate_size must be a positive whole number, got 0.",
        ),
        (
            llama(
                model_type="qwen3_5",
                vision_config={"num_heads": 2, "hidden_size": 8, "spatial_merge_size": 0},
            ),
            "vision_config.spatial_merge_size must be a positive whole number, got 0.",
        ),
        (
            llama(
                model_type="qwen3_5",
                vision_config={"num_heads": 2, "hidden_size": 0, "spatial_merge_size": 2},
            ),
            "vision_config.hidden_size must be a positive whole number, got 0.",
        ),
        (moe(n_shared_experts=-1), "n_shared_experts must be a positive whole number, got -1."),
        (llama(head_dim=0), "head_dim must be a positive whole number, got 0."),
        (llama() | {"vocab_size": 10**12}, "vocab_size must be at most "),
    ],
)
def test_a_size_that_is_none_is_not_validated(config: dict[str, Any], message: str) -> None:
    with pytest.raises(tpv.PlanError) as caught:
        plan(config)
    assert str(caught.value).startswith(f"Not validated: {message}")


def test_a_number_of_experts_that_is_none_is_not_validated() -> None:
    with pytest.raises(tpv.PlanError) as caught:
        plan(moe() | {"num_experts": -8}, ep=2)
    assert str(caught.value) == "Not validated: num_experts must be a positive whole number, got -8."
