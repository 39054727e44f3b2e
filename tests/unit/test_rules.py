from __future__ import annotations

import math

import pytest

from torchtitan_tp_validate.rules import (
    RULES,
    Plan,
    ShardedDim,
    describe_layers,
    divisors,
    group_by_size,
)


def plan(*sizes: int) -> Plan:
    dims = tuple(ShardedDim("TP002", size, (index,), "it dies") for index, size in enumerate(sizes))
    return Plan("Tiny", dims, len(sizes), "set it to {tp}")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 12, 16, 36, 97, 128, 210])
def test_divisors_are_exactly_the_numbers_that_divide(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("sizes", [(2,), (8, 12), (40, 8), (6, 4, 10), (7, 5)])
def test_valid_degrees_are_those_without_a_violation(sizes: tuple[int, ...]) -> None:
    the_plan = plan(*sizes)
    expected = [tp for tp in range(1, max(sizes) + 1) if not the_plan.violations(tp)]
    assert the_plan.valid_degrees() == expected
    assert expected == divisors(math.gcd(*sizes))


def test_violations_name_the_tightest_dimension_first() -> None:
    assert [dim.size for dim in plan(16, 2, 6).violations(4)] == [2, 6]


def test_readings_of_equal_size_become_one_dimension() -> None:
    dims = group_by_size([("TP002", 2, 0), ("TP002", 4, 1), ("TP002", 2, 2)], {"TP002": "it dies"})
    assert [(dim.size, dim.layers) for dim in dims] == [(2, (0, 2)), (4, (1,))]


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


def test_every_rule_names_its_dimension_its_reason_and_its_source() -> None:
    for code, rule in RULES.items():
        assert rule.code == code
        assert rule.dim.isidentifier()
        assert rule.why
        assert not rule.why.endswith(".")
        assert "torchtitan" in rule.source
