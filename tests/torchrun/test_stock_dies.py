"""The same runs without a guard die in their first forward pass: what a refusal prevents.

A guard that were in the way of a run that works would fail here too.
"""

from __future__ import annotations

import re

import pytest

from tests.torchrun.conftest import ResultOf
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line

FAMILIES = installed_line().FAMILIES
STOCK_FAILURE = re.compile(
    r"shape '\[.*\]' is invalid for input of size \d+"
    r"|Cannot unflatten unevenly sharded tensor: output dimension 0 \(size \d+\) is not evenly divisible"
)


def stock(family: str, *, upstream_check: bool = False) -> Case:
    return Case(family, tp=4, n_heads=8, n_kv_heads=2, upstream_check=upstream_check)


CASES = [*(stock(family) for family in FAMILIES), stock("llama3", upstream_check=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_guard_the_same_run_dies_in_its_first_forward_pass(
    result_of: ResultOf, family: str
) -> None:
    result = result_of(stock(family))
    assert (result.truth, result.stage) == ("exception", "forward"), result
    assert [report["rank"] for report in result.reports] == [0, 1, 2, 3], result
    for report in result.reports:
        assert report["sharded_parameters"] > 0, result
        assert STOCK_FAILURE.search(report["message"]), result


@pytest.mark.requires(torchtitan="0.3")
def test_upstreams_own_check_says_one_line_and_no_degrees(result_of: ResultOf) -> None:
    result = result_of(stock("llama3", upstream_check=True))
    assert result.stage == "build", result
    for report in result.reports:
        assert report["message"] == "tensor_parallel_degree (4) must divide n_kv_heads (2).", result
