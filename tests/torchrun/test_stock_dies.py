"""The same runs without a guard die in their first forward pass: what a refusal prevents.

A guard that were in the way of a run that works would fail here too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.torchrun import lines
from tests.torchrun.cases import FAMILIES, run
from tests.torchrun.harness import Result

STOCK_FAILURE = re.compile(
    r"shape '\[.*\]' is invalid for input of size \d+"
    r"|Cannot unflatten unevenly sharded tensor: output dimension 0 \(size \d+\) is not evenly divisible"
)


@pytest.fixture(scope="module")
def stock_twins(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Every family without any guard, one failing after the other on the same four ranks."""
    cases = [f"{family}:8/2:none" for family in FAMILIES]
    return run(tmp_path_factory.mktemp("stock"), "--no-upstream-check", "--case", *cases, tp=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_guard_the_same_run_dies_in_its_first_forward_pass(
    stock_twins: Result, family: str
) -> None:
    result = stock_twins
    assert result.returncode != 0, result
    reports = [report for report in result.reports if report["case"] == f"{family}:8/2:none"]
    assert [report["rank"] for report in reports] == [0, 1, 2, 3], result
    for report in reports:
        assert report["status"] == "raised", result
        assert report["stage"] == "forward", result
        assert report["sharded_parameters"] > 0, result
        assert STOCK_FAILURE.search(report["message"]), result


@pytest.mark.skipif(not hasattr(lines.installed_line(), "UPSTREAM_CHECKS"), reason="0.2.x has no check")
def test_upstreams_own_check_says_one_line_and_no_degrees(tmp_path: Path) -> None:
    result = run(tmp_path, "--case", "llama3:8/2:none", tp=4)
    for report in result.reports:
        assert report["stage"] == "build", result
        assert report["message"] == "tensor_parallel_degree (4) must divide n_kv_heads (2).", result
