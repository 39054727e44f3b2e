"""Above n_kv_heads every family is refused on every rank, before anything is touched.

Heads are written n_heads/n_kv_heads. What the refusals prevent is in test_stock_dies.py.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tests.torchrun.cases import FAMILIES, run
from tests.torchrun.harness import Result

GUARDS = ("wrapper", "install", "install-late")
HEADLINES = {
    "8/2": "Tensor parallel degree (4) must divide n_kv_heads (2).",  # twice as many ranks as KV heads
    "12/6": "Tensor parallel degree (4) must divide n_kv_heads (6).",  # more KV heads than ranks, uneven
    "6/6": "Tensor parallel degree (4) must divide n_heads (6).",  # query heads uneven too
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, list[dict[str, Any]]]]:
    """Every family, head counts and guard, refused one after the other by the same four ranks."""
    cases = [f"{family}:{heads}:{guard}" for family in FAMILIES for heads in HEADLINES for guard in GUARDS]
    # Upstream's own check is out of the way: it would speak first, and must not be needed.
    result = run(tmp_path_factory.mktemp("refusals"), "--no-upstream-check", "--case", *cases, tp=4)
    by_case = defaultdict(list)
    for report in result.reports:
        by_case[report["case"]].append(report)
    return result, by_case


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("heads", HEADLINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_indivisible_degree_is_refused_on_every_rank_before_anything_is_touched(
    refusals: tuple[Result, dict[str, list[dict[str, Any]]]], family: str, heads: str, guard: str
) -> None:
    result, by_case = refusals
    reports = by_case[f"{family}:{heads}:{guard}"]
    assert [report["rank"] for report in reports] == [0, 1, 2, 3], result
    assert len({report["message"] for report in reports}) == 1, result
    for report in reports:
        assert (report["status"], report["stage"]) == ("refused", "parallelize"), result
        assert report["message"].startswith(f"{HEADLINES[heads]} For "), result
        # 6 KV heads would allow 3 too, but the other sizes of the tiny models are powers of two.
        assert report["error_attrs"]["valid_degrees"] == [1, 2], result
        assert report["sharded_parameters"] == 0, result
        assert report["collectives_before_refusal"] == 0, result
        assert report["groups_before_refusal"] == 0, result


def test_a_refused_run_ends_with_an_error(refusals: tuple[Result, Any]) -> None:
    result = refusals[0]
    assert result.returncode != 0, result
    assert {report["status"] for report in result.reports} == {"refused"}, result
