"""Real torchtitan models under torchrun: TP = n_kv_heads trains, TP = 2 x n_kv_heads is refused.

Heads are written n_heads/n_kv_heads. Every refusal has its stock twin, which shows what the guard
prevents, and which fails if the guard were in its way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import lines
from tests.distributed.harness import Result, run_torchrun

FAMILIES = lines.installed_line().FAMILIES
TIMEOUT = 420
TOLERANCE = 1e-5
"""Relative; fp32 sums in another order differ by about 1e-6."""

GUARDS = ("wrapper", "install", "install-late")
HEADLINES = {
    "8/2": "Tensor parallel degree (4) must divide n_kv_heads (2).",  # twice as many ranks as KV heads
    "12/6": "Tensor parallel degree (4) must divide n_kv_heads (6).",  # more KV heads than ranks, uneven
    "6/6": "Tensor parallel degree (4) must divide n_heads (6).",  # query heads uneven too
}
STOCK_FAILURE = re.compile(
    r"shape '\[.*\]' is invalid for input of size \d+"
    r"|Cannot unflatten unevenly sharded tensor: output dimension 0 \(size \d+\) is not evenly divisible"
)


def run(tmp_path: Path, *arguments: str, tp: int) -> Result:
    result = run_torchrun([*arguments, "--tp", str(tp)], nproc=tp, timeout=TIMEOUT, out=tmp_path)
    assert not result.timed_out, result
    assert not result.leftover, result
    return result


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
