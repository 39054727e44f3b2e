"""KV-head replication under torchrun: every model trains at TP = m x n_kv_heads as it does at TP = 1.

Cases are those of `tests.torchrun.replication`. The long matrix is run by ``pytest -m long``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import lines
from tests.torchrun.harness import Result, run_torchrun
from tests.torchrun.replication import Case
from tests.torchrun.replication_truth import stock_differs

IS_0_3 = hasattr(lines.installed_line(), "UPSTREAM_CHECKS")
FAMILIES = (*lines.installed_line().FAMILIES, *(("qwen3_moe", "gpt_oss") if IS_0_3 else ()))
TIMEOUT = 900
TOLERANCE = 1e-5
"""Relative, of losses, gradients and norms."""

SHARED = [f"{family}:{how}" for family in FAMILIES for how in ("8/2", "8/1", "8/1:tp=2")]
"""Two and four ranks to a head at TP 4, and two at TP 2 beside FSDP of degree 2."""

VARIANTS_0_2 = [
    "qwen3:8/1:ac=full",
    "llama3:8/1:ac=selective",
    "llama3:8/1:tp=2,pp=2",
    "qwen3_moe:8/1:tp=2,ep=2",
]
VARIANTS_0_3 = [
    "llama3:8/1:sp=0",
    "llama3:8/2:backend=full_dtensor",
    "qwen3_fused:8/1:tp=2,backend=full_dtensor",
    "qwen3_fused:8/2:backend=partial_dtensor",
    "qwen3_5_moe:8/2:backend=partial_dtensor",
    "qwen3:8/1:ac=full",
    "qwen3_5:8/1:ac=selective",
    "llama3:8/1:tp=2,replicate=2",
    "llama3:8/2:compile=aot_eager",
    "llama3:8/1:tp=2,pp=2",
    "qwen3_5_moe:8/2:ep=4",
    "qwen3_moe:8/1:tp=2,ep=2",
]
CASES = SHARED + (VARIANTS_0_3 if IS_0_3 else VARIANTS_0_2)

LEFT_OUT = ["qwen3_moe:8/2:tp=2,stock=1,backend=partial_dtensor"] if IS_0_3 else []
"""What no case here can be compared with."""

REFUSED = {
    "llama3:12/6": "TP002 n_kv_heads = 6 is neither a multiple nor a divisor of 4",
    "llama3:6/2": "TP001 n_heads = 6 is not a multiple of 4",
    "llama3:12/3": "Tensor parallel degree (4) does not fit n_kv_heads (3)",
}

BACKENDS = ("spmd_types", "partial_dtensor", "full_dtensor") if IS_0_3 else ("",)
LONG = [
    f"{family}:{heads}:tp={tp},backend={backend},ac={ac}"
    for family in FAMILIES
    for backend in BACKENDS
    # torchtitan has no full_dtensor for qwen3_5.
    if not (family.startswith("qwen3_5") and backend == "full_dtensor")
    for heads, tp, ac in (("8/2", 4, "none"), ("8/1", 4, "full"), ("8/1", 4, "selective"), ("8/1", 2, "none"))
    if not stock_differs(family, backend, tp, lines.installed_line())
]


def run(cases: list[str], out: Path, timeout: float = TIMEOUT) -> Result:
    result = run_torchrun(
        ["--case", *cases, "--out", str(out)],
        nproc=4,
        timeout=timeout,
        out=out,
        module="tests.torchrun.replication",
    )
    assert not result.timed_out, result
    assert not result.leftover, result
    return result


def reports_of(result: Result, case: str) -> list[dict[str, Any]]:
    reports = [report for report in result.reports if report["case"] == case]
    assert [report["rank"] for report in reports] == [0, 1, 2, 3], result
    return reports


def assert_trains_like_one_process(result: Result, case: str) -> None:
    for report in reports_of(result, case):
        assert report["status"] == "trained", report
        assert len(report["losses"]) == 3, report
        assert len(set(report["losses"])) == 3, report
        assert report["losses"] == pytest.approx(report["reference_losses"], rel=TOLERANCE), report
        assert report["norms"] == pytest.approx(report["reference_norms"], rel=TOLERANCE), report
        assert report["compared_gradients"] >= 3 * 9, report
        assert report["max_rel_gradient_difference"] < TOLERANCE, report


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Every case, one after the other by the same four ranks."""
    return run([*CASES, *LEFT_OUT, *REFUSED], tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("case", CASES)
def test_shared_heads_train_like_one_process(trained: Result, case: str) -> None:
    assert_trains_like_one_process(trained, case)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_differs_without_replication_too(trained: Result, case: str) -> None:
    parsed = Case.parse(case)
    assert stock_differs(parsed.family, parsed.how.backend, parsed.how.tp, lines.installed_line())
    for report in reports_of(trained, case):
        assert report["status"] == "trained", report
        assert report["max_rel_gradient_difference"] > 0.1, report


@pytest.mark.parametrize("case", SHARED)
def test_wk_and_wv_stay_sharded_over_all_ranks(trained: Result, case: str) -> None:
    rows = [report["rows_of_wk"] for report in reports_of(trained, case)]
    heads = int(case.split(":")[1].split("/")[1])
    head_dim = lines.installed_line().HEAD_DIM
    # The four ranks of TP, or of FSDP x TP, hold a fourth each: nothing is kept whole.
    assert rows == [[heads * head_dim // 4] * len(rows[0])] * 4
    assert len(rows[0]) >= 2


@pytest.mark.long
def test_the_long_matrix(tmp_path: Path) -> None:
    result = run(LONG, tmp_path, timeout=3600)
    for case in LONG:
        assert_trains_like_one_process(result, case)


@pytest.mark.parametrize("case", REFUSED)
def test_a_degree_that_does_not_fit_even_so_is_refused_on_every_rank(trained: Result, case: str) -> None:
    reports = reports_of(trained, case)
    assert len({report["message"] for report in reports}) == 1, reports
    for report in reports:
        assert report["status"] == "refused", report
        assert REFUSED[case] in report["message"], report
