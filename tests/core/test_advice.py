"""What a refusal says works instead, word for word."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import attention_layer, config_tree, model_args, model_with_experts, refusal
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import Plan, ShardedDim
from torchtitan_tp_validate.rules import Otherwise
from torchtitan_tp_validate.validate import compat_error

SIX_EXPERTS = SimpleNamespace(num_experts=6)


def toml(flag: str, degree: int) -> str:
    return f"--parallelism.{flag} {degree}, or in the job's TOML file:\n  [parallelism]\n  {flag} = {degree}"


def test_an_expert_degree_is_called_by_its_name() -> None:
    error = refusal(model_args(8, 8, moe_args=SIX_EXPERTS), Degrees(tp=2, ep=4, dp_shard=2))
    assert error.headline == (
        "Expert parallel degree (4) must divide num_experts (6). For Tiny, max supported EP is 2."
    )
    # EP 3 and 6 would leave ranks over: 2 data shards of TP 2.
    assert error.advice == (
        f"Expert parallel degrees that work: 1, 2.\nTo change it: {toml('expert_parallel_degree', 2)}"
    )
    assert error.valid_degrees == []


def test_the_axis_at_fault_and_tensor_parallelism_are_offered() -> None:
    # Four experts on 2 * 8 ranks: FSDP cuts rows of 36 and 64 into 8 * 8 / 4 parts.
    error = refusal(model_with_experts(36), Degrees(tp=8, ep=4, dp_shard=8))
    assert error.headline == (
        "Data parallel shard degree (8) does not fit expert_hidden_dim (36). "
        "For Tiny, max supported FSDP is 2."
    )
    assert error.advice == (
        "Data parallel shard degrees that work: 1, 2.\n"
        "Tensor parallel degrees that work: 1, 2.\n"
        f"To change it: {toml('data_parallel_shard_degree', 2)}"
    )
    assert error.valid_degrees == [1, 2]


def test_no_tensor_parallelism_is_a_degree_that_works_too() -> None:
    error = refusal(model_with_experts(36), Degrees(tp=2, ep=2, cp=2, dp_shard=4))
    assert error.advice.startswith(
        "Data parallel shard degrees that work: 1, 2.\nTensor parallel degrees that work: 1.\n"
    )


def test_where_no_degree_alone_helps_the_nearest_layout_is_named_with_every_flag() -> None:
    error = refusal(model_args(8, 2, moe_args=SIX_EXPERTS), Degrees(tp=4, ep=4, dp_shard=2))
    assert error.headline == (
        "Tensor parallel degree (4) must divide n_kv_heads (2). For Tiny, max supported TP is 2."
    )
    assert error.advice == (
        "No other tensor parallel degree or expert parallel degree works by itself. The nearest degrees that "
        "work: tensor parallel degree 2 with expert parallel degree 2.\n"
        f"To change it: {toml('tensor_parallel_degree', 2)}\nand: {toml('expert_parallel_degree', 2)}"
    )


def test_another_degree_is_offered_before_the_model_is_to_be_changed() -> None:
    # A sequence of 12 suits TP 1 at CP 2 only where it is cut in 2 * CP; seq_len 6 suits none at CP 2.
    error = refusal(model_args(8, 8), Degrees(tp=2, cp=2, seq_len=12))
    assert "Degrees that work" not in refusal(model_args(8, 8), Degrees(tp=2, cp=2, seq_len=6)).advice
    assert error.advice == f"Degrees that work: 1.\nTo change it: {toml('tensor_parallel_degree', 1)}"
    assert refusal(model_args(8, 8), Degrees(tp=2, cp=2, seq_len=6)).advice == (
        "No other tensor parallel degree works by itself. The nearest degrees that work: tensor parallel "
        "degree 1 with context parallel degree 1.\n"
        f"To change it: {toml('tensor_parallel_degree', 1)}\nand: {toml('context_parallel_degree', 1)}"
    )
    assert refusal(model_args(8, 8), Degrees(tp=2, cp=2, seq_len=7)).advice == (
        "No degree works: seq_len (7) is not a multiple of 2, so change it instead."
    )


def test_the_degree_of_tensor_parallelism_within_experts_follows() -> None:
    model = model_with_experts(36, n_kv_heads=2)
    error = refusal(model, Degrees(tp=4, ep=2, etp=4, dp_shard=2))
    assert error.advice.startswith("Degrees that work: 1, 2.\n")
    assert error.advice.endswith(
        f"To change it: {toml('tensor_parallel_degree', 2)}\nand: {toml('expert_tensor_parallel_degree', 2)}"
    )


def test_what_fits_a_half_read_model_is_not_said_to_work() -> None:
    half_read = config_tree(attention_layer(8, 4), SimpleNamespace(attention=None, mixer="mamba"))
    error = refusal(half_read, Degrees(tp=8))
    assert error.advice.startswith("Degrees that fit what could be read: 1, 2, 4.\n")
    assert error.valid_degrees == [1]


def test_replication_that_cannot_be_had_is_said_to_be_so() -> None:
    assert refusal(model_args(8, 2), Degrees(tp=4, replicate_kv_heads=True)).advice == (
        "Degrees that work: 1, 2.\n"
        "KV-head replication was asked for, but is not available for this model here.\n"
        f"To change it: {toml('tensor_parallel_degree', 2)}"
    )


def test_where_no_smaller_degree_works_the_next_larger_is_the_nearest() -> None:
    # Without expert parallelism TP 2 would cut the fused rows of 2 * 7 out of step.
    model = model_with_experts(7, fused=True, moe_args=SimpleNamespace(num_experts=5))
    assert refusal(model, Degrees(tp=2, ep=2, dp_shard=5, fsdp=False)).advice == (
        f"Expert parallel degrees that work: 5.\nTo change it: {toml('expert_parallel_degree', 5)}"
    )


def test_data_shards_that_work_are_shown_as_a_range_and_nothing_else_is() -> None:
    rows = ShardedDim("FSDP001", 12, (0,), Otherwise("dies"))
    error = compat_error(Plan("Tiny", (rows,), 1, ("set {flag} to {degree}",)), Degrees(tp=2, dp_shard=5))
    assert error is not None
    assert error.advice == (
        "Data parallel shard degrees that work: 1-4, 6, 12.\n"
        "To change it: set data_parallel_shard_degree to 4"
    )
    assert refusal(model_args(12, 6), Degrees(tp=16)).advice.startswith("Degrees that work: 1, 2, 3, 6.\n")


def test_a_degree_that_follows_another_is_no_choice_of_its_own() -> None:
    degrees = Degrees(tp=3, ep=4, etp=3, cp=2, dp_shard=16, seq_len=24)
    assert refusal(model_args(8, 2, moe_args=SIX_EXPERTS), degrees).advice.startswith(
        "No other tensor parallel degree or expert parallel degree works by itself. The nearest degrees that "
        "work: tensor parallel degree 2 with expert parallel degree 2 with expert tensor parallel degree 2.\n"
    )


@pytest.mark.parametrize(
    ("degrees", "work", "changes"),
    [
        # The number of ranks stays where it can, else it falls rather than rises.
        (
            Degrees(tp=2, ep=6, etp=2, cp=3, dp_shard=4, dp_replicate=2, seq_len=64),
            "data parallel shard degree 3 with context parallel degree 4",
            {"data_parallel_shard_degree": 3, "context_parallel_degree": 4},
        ),
        (
            Degrees(tp=2, cp=3, dp_shard=3, dp_replicate=2, seq_len=64),
            "context parallel degree 2",
            {"context_parallel_degree": 2},
        ),
    ],
)
def test_another_axis_is_changed_where_that_is_the_least(
    degrees: Degrees, work: str, changes: dict[str, int]
) -> None:
    how = "\nand: ".join(toml(flag, degree) for flag, degree in changes.items())
    assert refusal(model_args(8, 2, moe_args=SIX_EXPERTS), degrees).advice == (
        f"No other tensor parallel degree works by itself. The nearest degrees that work: {work}.\n"
        f"To change it: {how}"
    )


def test_degrees_at_which_a_model_cannot_be_read_are_not_offered() -> None:
    rows = Plan("Tiny", (ShardedDim("TP005", 7, (0,), Otherwise("dies")),), 1, ("set {flag} to {degree}",))

    def read_at(degrees: Degrees) -> Plan:
        if degrees.tp != 4:
            raise tpv.PlanError("unread")
        return rows

    error = compat_error(replace(rows, read_at=read_at), Degrees(tp=4))
    assert error is not None
    assert error.advice == "No other degree is known to work: the model could not be read at any."
