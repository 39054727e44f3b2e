"""What FSDP and the grouped product ask of experts, and how the error says it."""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import model_with_experts, refusal
from torchtitan_tp_validate.degrees import Axis, Degrees, read_degrees
from torchtitan_tp_validate.job import read_job
from torchtitan_tp_validate.plan import Plan, PlanBuilder
from torchtitan_tp_validate.releases import read_plan
from torchtitan_tp_validate.releases.experts import Experts, note_experts, row_shards
from torchtitan_tp_validate.rules import Line
from torchtitan_tp_validate.validate import judge
from torchtitan_tp_validate.wrappers.guard import guard

HIDDEN = ("expert_hidden_dim", 36, True)


def plan(degrees: Degrees, *, grouped: bool = False, shards: Fraction | None = None) -> Plan:
    findings = PlanBuilder(Line.SPMD_TYPES)
    read = Experts(36, (HIDDEN, ("dim", 64, False), HIDDEN), grouped)
    note_experts(findings, read, degrees, (0,), tp=degrees.tp, row_shards=shards)
    return Plan("Tiny", findings.dims(), 1, ("set {flag} to {degree}",), degrees=degrees)


def sizes(the_plan: Plan) -> list[tuple[str, int]]:
    return [(dim.name, dim.size) for dim in the_plan.dims]


@pytest.mark.parametrize(
    ("degrees", "ranks", "shards"),
    [
        (Degrees(tp=2, dp_shard=4), 4, None),
        (Degrees(tp=2, dp_shard=4), 8, 1),
        (Degrees(tp=2, dp_shard=4, cp=2), 8, 2),
        (Degrees(tp=2, dp_shard=4, ep=2), 8, 1),
        (Degrees(tp=1, dp_shard=8, ep=4), 8, Fraction(1, 4)),
        (Degrees(tp=2, dp_shard=4, ep=2, etp=2), 8, Fraction(1, 2)),
        (Degrees(tp=2, dp_shard=4, cp=2, ep=2), 16, 2),
        (Degrees(tp=2, dp_shard=4, fsdp=False), 8, None),
        (Degrees(tp=1, dp_shard=8, ep=3), 8, None),
    ],
    ids=["enough experts", "TP", "CP", "EP of TP", "EP", "ETP", "EP and CP", "not by apply_fsdp", "no mesh"],
)
def test_fsdp_cuts_rows_when_there_are_more_ranks_than_experts(
    degrees: Degrees, ranks: int, shards: Fraction | None
) -> None:
    assert row_shards(degrees, 4, ranks=ranks) == shards


def test_each_kind_of_row_is_judged_once_at_the_size_that_tensor_parallelism_leaves() -> None:
    assert sizes(plan(Degrees(tp=2), shards=Fraction(1))) == [("expert_hidden_dim / tp", 18), ("dim", 64)]
    assert sizes(plan(Degrees(tp=1), shards=Fraction(1))) == [("expert_hidden_dim", 36), ("dim", 64)]
    uneven = plan(Degrees(tp=5), shards=Fraction(1))
    assert sizes(uneven)[:2] == [("expert_hidden_dim / tp", 8), ("expert_hidden_dim / tp", 4)]
    empty = plan(Degrees(tp=8), shards=Fraction(1))  # 5 on seven ranks, 1 on the last
    assert sizes(empty)[:2] == [("expert_hidden_dim / tp", 5), ("expert_hidden_dim / tp", 1)]
    for tp, rows in ((13, 3), (20, 2)):  # whole parts for 12 and 18 ranks, and nothing for the others
        assert sizes(plan(Degrees(tp=tp), shards=Fraction(1)))[:2] == [
            ("expert_hidden_dim / tp", rows),
            ("dim", 64),
        ]


def test_degrees_that_shard_the_rows_evenly() -> None:
    assert plan(Degrees(tp=2), shards=Fraction(1)).valid_degrees(Axis.FSDP) == [1, 2]
    assert plan(Degrees(tp=2, cp=2), shards=Fraction(2)).valid_degrees(Axis.FSDP) == [1]
    by_ep = plan(Degrees(tp=1, ep=4, dp_shard=8), shards=Fraction(1, 4))
    assert by_ep.valid_degrees(Axis.FSDP) == [4, 8, 16]
    assert not by_ep.violations(Degrees(tp=1, ep=4, dp_shard=16))
    assert by_ep.violations(Degrees(tp=1, ep=4, dp_shard=32))


@pytest.mark.parametrize(
    ("degrees", "grouped", "judged"),
    [
        (Degrees(tp=2), True, True),
        (Degrees(tp=2), False, False),
        (Degrees(tp=2, device_type="cpu"), True, False),
        (Degrees(tp=2, device_type="xpu"), True, False),
    ],
)
def test_alignment_counts_where_the_grouped_kernel_of_cuda_runs(
    degrees: Degrees, grouped: bool, judged: bool
) -> None:
    assert sizes(plan(degrees, grouped=grouped)) == ([("expert_hidden_dim", 36)] if judged else [])


def test_a_part_that_is_not_aligned_is_refused() -> None:
    judge(model_with_experts(48, grouped=False), Degrees(tp=4))
    assert str(refusal(model_with_experts(48, grouped=True), Degrees(tp=4))) == (
        "Tensor parallel degree (4) does not fit expert_hidden_dim (48). For Tiny, max supported TP is 2.\n"
        "\n"
        "  TP013 expert_hidden_dim = 48 does not give each of 4 ranks a multiple of 8, in the only layer:\n"
        "        the grouped product of routed experts takes rows of whole 16 bytes, 8 in bfloat16.\n"
        "\n"
        'Without this check: the first forward pass dies with "strides should be multiple of 16 bytes".\n'
        "Degrees that work: 1, 2.\n"
        "To change it: --parallelism.tensor_parallel_degree 2, or in the job's TOML file:\n"
        "  [parallelism]\n"
        "  tensor_parallel_degree = 2"
    )


def test_a_size_that_suits_no_degree_is_to_be_changed_itself() -> None:
    error = refusal(model_with_experts(36, grouped=True), Degrees(tp=2))
    assert str(error) == (
        "Tensor parallel degree (2) does not fit expert_hidden_dim (36). "
        "For Tiny, no tensor parallel degree works.\n"
        "\n"
        "  TP013 expert_hidden_dim = 36 does not give each of 2 ranks a multiple of 8, in the only layer:\n"
        "        the grouped product of routed experts takes rows of whole 16 bytes, 8 in bfloat16.\n"
        "\n"
        'Without this check: the first forward pass dies with "strides should be multiple of 16 bytes".\n'
        "No degree works: expert_hidden_dim (36) is not a multiple of 8, so change it instead."
    )
    assert error.valid_degrees == [1]  # where nothing is split, nothing is judged


def test_more_data_shards_than_experts_is_refused_in_its_own_words() -> None:
    degrees = Degrees(tp=1, ep=2, dp_shard=8)
    judge(model_with_experts(36, grouped=False), degrees)
    assert str(refusal(model_with_experts(34, grouped=False), degrees)) == (
        "Data parallel shard degree (8) does not fit expert_hidden_dim (34). "
        "For Tiny, max supported FSDP is 4.\n"
        "\n"
        "  FSDP001 expert_hidden_dim = 34 is not a multiple of 4, in the only layer:\n"
        "        with more ranks than experts, FSDP cuts the rows of their weights, and only evenly.\n"
        "\n"
        "Without this check: the parallelize function stops with\n"
        '  "FSDP does not support uneven sharding on dim 1", when the process groups are up.\n'
        "Data parallel shard degrees that work: 2, 4.\n"
        "To change it: --parallelism.data_parallel_shard_degree 4, or in the job's TOML file:\n"
        "  [parallelism]\n"
        "  data_parallel_shard_degree = 4"
    )


@pytest.mark.parametrize(
    ("module", "refused"),
    [
        ("torchtitan.models.llama4.infra.parallelize", True),
        ("torchtitan.experiments.simple_fsdp.llama4.parallelize", False),
    ],
)
def test_only_the_models_own_functions_are_known_to_apply_fsdp(module: str, refused: bool) -> None:
    def parallelize(model: Any, parallel_dims: Any, job_config: Any) -> str:
        return "went through"

    parallelize.__module__ = module
    call = (model_with_experts(34, grouped=False), SimpleNamespace(tp=1, ep=2, dp_shard=8), None)
    if refused:
        with pytest.raises(tpv.TPCompatError, match="Data parallel shard degree"):
            guard(parallelize)(*call)
    else:
        assert guard(parallelize)(*call) == "went through"


def test_the_device_is_what_torchtitan_says_and_cuda_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtitan.tools.utils", SimpleNamespace(device_type="cpu"))
    assert read_degrees(2).device_type == read_degrees(SimpleNamespace(tp=2)).device_type == "cpu"
    monkeypatch.delitem(sys.modules, "torchtitan.tools.utils")
    assert read_degrees(2).device_type == "cuda"


def test_rows_that_an_unknown_number_of_ranks_may_shard_are_not_judged() -> None:
    degrees = Degrees(tp=2, dp_shard_is_known=False)

    def about_fsdp(degrees: Degrees) -> list[str]:
        return [text for text in read_plan(model_with_experts(), degrees).not_judged if "FSDP001" in text]

    (left_out,) = about_fsdp(degrees)
    assert left_out == (
        "FSDP001: data_parallel_shard_degree is left to the number of ranks, which is not known before the "
        "run starts"
    )
    for judged in (replace(degrees, dp_shard_is_known=True), replace(degrees, fsdp=False)):
        assert about_fsdp(judged) == []


@pytest.mark.parametrize(("asked", "least", "known"), [(8, 8, True), (1, 1, True), (-1, 1, False)])
def test_a_job_that_leaves_the_data_shards_to_the_number_of_ranks_is_judged_by_the_guard(
    asked: int, least: int, known: bool
) -> None:
    parallelism = SimpleNamespace(
        tensor_parallel_degree=2,
        data_parallel_shard_degree=asked,
        data_parallel_replicate_degree=3,
        expert_tensor_parallel_degree=2,
    )
    spec = SimpleNamespace(name="tiny", flavor="", model=None, parallelize_fn=print)
    job = read_job(SimpleNamespace(model_spec=spec, parallelism=parallelism))
    assert job is not None
    degrees = job.degrees
    assert (degrees.tp, degrees.dp_shard, degrees.dp_replicate, degrees.etp) == (2, least, 3, 2)
    assert degrees.dp_shard_is_known is known
