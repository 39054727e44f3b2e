"""At TP = n_kv_heads every family trains what one process trains, guards in place."""

from __future__ import annotations

import pytest

from tests.torchrun.cases import FAMILIES, run
from tests.torchrun.harness import Result

TOLERANCE = 1e-5
"""Relative; fp32 sums in another order differ by about 1e-6."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Every family at TP = n_kv_heads, one after the other by the same two ranks."""
    cases = [f"{family}:8/2:install" for family in FAMILIES]
    return run(tmp_path_factory.mktemp("trained"), "--case", *cases, tp=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_tp_of_n_kv_heads_trains_like_one_process(trained: Result, family: str) -> None:
    result = trained
    assert result.returncode == 0, result
    reports = [report for report in result.reports if report["case"] == f"{family}:8/2:install"]
    assert [report["rank"] for report in reports] == [0, 1], result
    for report in reports:
        assert report["status"] == "trained", result
        assert report["sharded_parameters"] > 0, result
        assert report["collectives_in_training"] > 0, result
        assert len(report["losses"]) == 2, result
        assert report["losses"] == pytest.approx(report["reference_losses"], rel=TOLERANCE), result
        assert report["losses"][0] != report["losses"][1], result
        assert report["compared_gradients"] >= 2 * 15, result
        assert report["max_rel_gradient_difference"] < TOLERANCE, result
