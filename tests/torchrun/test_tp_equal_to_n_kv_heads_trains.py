"""At TP = n_kv_heads every family trains what one process trains, guards in place."""

from __future__ import annotations

import pytest

from tests.torchrun.conftest import ResultOf
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line

FAMILIES = installed_line().FAMILIES
TOLERANCE = 1e-5
"""Relative; fp32 sums in another order differ by about 1e-6."""


def at_n_kv_heads(family: str) -> Case:
    return Case(family, tp=2, n_heads=8, n_kv_heads=2, guard="install", upstream_check=True)


CASES = [at_n_kv_heads(family) for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_tp_of_n_kv_heads_trains_like_one_process(result_of: ResultOf, family: str) -> None:
    result = result_of(at_n_kv_heads(family))
    assert result.truth == "equal", result
    assert [report["rank"] for report in result.reports] == [0, 1], result
    for report in result.reports:
        assert report["sharded_parameters"] > 0, result
        assert report["collectives_in_training"] > 0, result
        assert len(report["losses"]) == 2, result
        assert report["losses"] == pytest.approx(report["reference_losses"], rel=TOLERANCE), result
        assert report["losses"][0] != report["losses"][1], result
        assert report["compared_gradients"] >= 2 * 15, result
        assert report["gradient_difference"] < TOLERANCE, result
