from __future__ import annotations

import math
from dataclasses import replace

import pytest

from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.plan import (
    Plan,
    PlanBuilder,
    ShardedDim,
    Split,
    describe_layers,
    describe_places,
    divisors,
    ranges,
)
from torchtitan_tp_validate.rules import ALIGNMENT, Line, Otherwise

DIES = Otherwise("dies", "it dies.")


def plan(*sizes: int) -> Plan:
    dims = tuple(ShardedDim("TP002", size, (index,), DIES) for index, size in enumerate(sizes))
    return Plan("Tiny", dims, len(sizes), ("set {flag} to {degree}",))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 12, 16, 36, 97, 128, 210])
def test_divisors_are_exactly_the_numbers_that_divide(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("sizes", [(2,), (8, 12), (40, 8), (6, 4, 10), (7, 5)])
def test_valid_degrees_are_those_without_a_violation(sizes: tuple[int, ...]) -> None:
    the_plan = plan(*sizes)
    expected = [tp for tp in range(1, max(sizes) + 1) if not the_plan.violations(Degrees(tp))]
    assert the_plan.valid_degrees() == expected
    assert expected == divisors(math.gcd(*sizes))


def test_violations_name_the_tightest_dimension_first() -> None:
    assert [dim.size for dim in plan(16, 2, 6).violations(Degrees(4))] == [2, 6]


def test_readings_of_equal_size_become_one_dimension() -> None:
    findings = PlanBuilder(Line.SPMD_TYPES)
    for layer, size in enumerate((2, 4, 2)):
        findings.add("TP002", size, layers=(layer,))
    assert [(dim.size, dim.layers) for dim in findings.dims()] == [(2, (0, 2)), (4, (1,))]


def test_what_is_outside_the_layers_is_named_by_its_place() -> None:
    findings = PlanBuilder(Line.SPMD_TYPES)
    for place in ("tok_embeddings", "lm_head", "lm_head"):
        findings.add("TP006", 255, place=place)
    (dim,) = findings.dims()
    assert describe_places(dim, 2) == "tok_embeddings and lm_head"


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("size", [*range(1, 20), 32, 64, 248])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8, 16])
def test_a_split_allows_what_its_shards_show(split: Split, size: int, degree: int) -> None:
    def shards(n: int) -> list[int]:  # as torch.chunk and DTensor cut
        width = -(-n // degree)
        return [max(0, min(width, n - width * rank)) for rank in range(degree)]

    def users(n: int) -> list[list[int]]:  # the ranks of each unit, as query heads are dealt out
        return [[rank for rank in range(degree) if rank * n // degree == unit] for unit in range(n)]

    allowed = {
        Split.EVEN: len(set(shards(size))) == 1,
        Split.NOT_EMPTY: 0 not in shards(size),
        Split.IN_STEP: shards(2 * size) == [2 * part for part in shards(size)],
        # Units dealt out to ranks, or ranks to units: nobody is left over.
        Split.SHARED: len(set(shards(size))) == 1 or all(degree / size == len(r) for r in users(size)),
        Split.ALIGNED: all(part % ALIGNMENT == 0 for part in shards(size)),
    }[split]
    assert split.allows(size, degree) is allowed


def test_each_axis_has_its_own_degrees() -> None:
    dims = (ShardedDim("TP002", 8, (0,), DIES), ShardedDim("EP001", 6, (0,), DIES))
    the_plan = Plan("Tiny", dims, 1, ("set {flag} to {degree}",))
    assert the_plan.valid_degrees() == [1, 2, 4, 8]
    assert the_plan.valid_degrees(Axis.EP) == [1, 2, 3, 6]
    assert [dim.code for dim in the_plan.violations(Degrees(tp=3, ep=4))] == ["TP002", "EP001"]
    assert not the_plan.violations(Degrees(tp=4, ep=3))


def test_degrees_of_an_uneven_split_stop_where_a_shard_is_empty() -> None:
    dims = (
        ShardedDim("TP001", 8, (0,), DIES),
        ShardedDim("TP006", 9, (), DIES, split=Split.NOT_EMPTY),
    )
    assert Plan("Tiny", dims, 1, ("{flag} {degree}",)).valid_degrees() == [1, 2]
    assert Plan("Tiny", dims[1:], 1, ("{flag} {degree}",)).valid_degrees() == [1, 2, 3, 5, 9]


@pytest.mark.parametrize(
    ("layers", "n_layers", "text"),
    [
        ((0,), 1, "the only layer"),
        (range(40), 40, "all 40 layers"),
        ((1,), 40, "layer 1 (1 of 40)"),
        ((0, 1), 40, "layers 0, 1 (2 of 40)"),
        ((4, 5, 6), 40, "layers 4-6 (3 of 40)"),
        ((3, 7, 11), 12, "layers 3, 7, 11 (3 of 12)"),
        ((0, 2, 4, 6), 12, "layers 0, 2, 4, 6 (4 of 12)"),
        ((0, 2, 4, 6, 8), 12, "layers 0, 2, ..., 8 (5 of 12)"),
        (range(3, 40, 4), 40, "layers 3, 7, ..., 39 (10 of 40)"),
    ],
)
def test_layers_are_described_in_few_words(layers: range, n_layers: int, text: str) -> None:
    assert describe_layers(tuple(layers), n_layers) == text


def test_numbers_that_follow_one_another_are_a_range() -> None:
    assert ranges([1, 2, 3, 4, 8]) == "1-4, 8"
    assert ranges([1, 2, 5]) == "1, 2, 5"


def test_shared_heads_take_the_place_of_n_kv_heads() -> None:
    kv_heads = ShardedDim("TP002", 2, (0,), DIES)
    shared = ShardedDim("TP002", 2, (0,), DIES, split=Split.SHARED)
    the_plan = Plan("Tiny", (ShardedDim("TP001", 8, (0,), DIES), kv_heads), 1, "", shared_kv=(shared,))
    assert the_plan.replication_degrees == [4, 8]
    assert the_plan.added_by_replication(Degrees(tp=1, replicate_kv_heads=True)) == []
    assert the_plan.with_kv_replication().degrees == Degrees(tp=1, replicate_kv_heads=True)
    assert the_plan.with_kv_replication().valid_degrees() == [1, 2, 4, 8]


def test_degrees_at_which_a_model_cannot_be_read_are_not_accepted() -> None:
    def read_at(degrees: Degrees) -> Plan:
        if degrees.tp != 2:
            raise PlanError("unread")
        return plan(8)

    the_plan = replace(plan(8), read_at=read_at)
    assert [tp for tp in (2, 4, 8) if the_plan.accepts(Degrees(tp))] == [2]
    assert the_plan.candidates(Axis.TP, Degrees(2)) == [1, 2, 4, 8]
    assert Plan("Tiny", (), 1, "", listed_up_to=3).candidates(Axis.EP, Degrees(2)) == [1]


def test_the_tp_degrees_to_look_among_are_those_of_no_tensor_parallelism() -> None:
    # What is split at TP 1 is split at any; a degree of its own may split more.
    the_plan = replace(plan(2), read_at=lambda degrees: plan(8) if degrees.tp == 1 else plan(2))
    assert the_plan.candidates(Axis.TP, Degrees(2)) == [1, 2, 4, 8]
    by_tp = replace(
        plan(2),
        read_at=lambda degrees: Plan(
            "Tiny", (ShardedDim("EP001", 6 if degrees.tp > 1 else 4, (), DIES),), 1, ""
        ),
    )
    assert by_tp.candidates(Axis.EP, Degrees(2, ep=2)) == [1, 2, 3, 6]


def test_of_data_shards_all_smaller_numbers_are_looked_at_until_there_are_too_many() -> None:
    the_plan = Plan("Tiny", (ShardedDim("FSDP001", 2, (0,), DIES),), 1, "")
    assert the_plan.candidates(Axis.FSDP, Degrees(1, dp_shard=5)) == [1, 2, 3, 4, 5]
    assert the_plan.candidates(Axis.FSDP, Degrees(1, dp_shard=1024)) == list(range(1, 1025))
    assert the_plan.candidates(Axis.FSDP, Degrees(1, dp_shard=1026)) == divisors(1026)
