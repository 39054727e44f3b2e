from __future__ import annotations

import math

import pytest

from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.plan import (
    Plan,
    PlanBuilder,
    ShardedDim,
    Split,
    describe_layers,
    describe_places,
    divisors,
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
        (range(3, 40, 4), 40, "layers 3, 7, ..., 39 (10 of 40)"),
    ],
)
def test_layers_are_described_in_few_words(layers: range, n_layers: int, text: str) -> None:
    assert describe_layers(tuple(layers), n_layers) == text
