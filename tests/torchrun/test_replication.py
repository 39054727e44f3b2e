"""KV-head replication under torchrun: every model trains at TP = m x n_kv_heads as it does at TP = 1.

Cases are in the words of `Case.parse`, on four ranks. The long matrix is run by ``pytest -m long``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.torchrun.conftest import ResultOf
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.runner import Result, run_cases

LINE = installed_line()
FAMILIES = LINE.SHARED_KV_HEADS
TOLERANCE = 1e-5
"""Relative, of losses, gradients and norms."""

SHARED = ["llama3:8/1"] + [f"{family}:{how}" for family in FAMILIES for how in ("8/2", "8/1:tp=2")]
"""Four and two ranks to a head at TP 4, and two at TP 2 beside FSDP of degree 2."""

VARIANTS = [
    "qwen3:8/1:ac=full",
    "llama3:8/1:tp=2,pp=2",
    "qwen3_moe:8/1:tp=2,ep=2",
    *(
        [
            "llama3:8/1:sp=0",
            "llama3:8/2:backend=full_dtensor",
            "qwen3_fused:8/1:tp=2,backend=full_dtensor",
            "qwen3_fused:8/2:backend=partial_dtensor",
            "qwen3_5_moe:8/2:backend=partial_dtensor",
            "qwen3_5:8/1:ac=selective",
            "llama3:8/1:tp=2,dp_replicate=2",
            "llama3:8/2:compile=aot_eager",
            "qwen3_5_moe:8/2:ep=4",
            "qwen3_moe:8/2:tp=2,backend=partial_dtensor",
        ]
        if "qwen3_5" in FAMILIES
        else ["llama3:8/1:ac=selective"]
    ),
]
TRAINED = SHARED + [
    text
    for text in VARIANTS
    if (case := Case.parse(text, 4)).spmd_backend in (None, *LINE.BACKENDS[case.family])
]

REFUSED = {
    "llama3:12/6": "TP002 n_kv_heads = 6 is neither a multiple nor a divisor of 4",
    "llama3:6/2": "TP001 n_heads = 6 is not a multiple of 4",
    "llama3:12/3": "Tensor parallel degree (4) does not fit n_kv_heads (3)",
}

COMPILED = [
    *("llama3:8/1:compile=inductor", "llama3:8/1:ac=selective,compile=inductor"),
    *("qwen3_moe:8/1:ep=2,compile=inductor", "gpt_oss:8/1:ep=2,compile=inductor"),
    *("qwen3_5_moe:8/1:compile=inductor", "muse_glimmer:8/1:compile=inductor"),
]
"""At TP 2 on two ranks."""

LONG = [
    f"{family}:{heads}:tp={tp},{f'backend={backend},' if backend else ''}ac={ac}"
    for family in FAMILIES
    for backend in LINE.BACKENDS[family]
    for heads, tp, ac in (("8/2", 4, "none"), ("8/1", 4, "full"), ("8/1", 4, "selective"), ("8/1", 2, "none"))
]


def shared(text: str, ranks: int = 4) -> Case:
    settings: dict[str, Any] = {"guard": "install", "upstream_check": True, "as_trainer": True, "ac": "none"}
    return Case.parse(text, ranks, replicate_kv_heads=True, **settings)


CASES = [*map(shared, [*TRAINED, *REFUSED])]


def assert_trains_like_one_process(result: Result) -> None:
    assert result.truth == "equal", result
    assert [report["rank"] for report in result.reports] == [*range(result.case.world_size)], result
    for report in result.reports:
        assert len(report["losses"]) == 3, report
        assert len(set(report["losses"])) == 3, report
        assert report["losses"] == pytest.approx(report["reference_losses"], rel=TOLERANCE), report
        assert report["norms"] == pytest.approx(report["reference_norms"], rel=TOLERANCE), report
        assert report["compared_gradients"] >= 3 * 9, report
        assert report["gradient_difference"] < TOLERANCE, report


@pytest.mark.parametrize("case", TRAINED)
def test_shared_heads_train_like_one_process(result_of: ResultOf, case: str) -> None:
    assert_trains_like_one_process(result_of(shared(case)))


@pytest.mark.parametrize("case", SHARED)
def test_wk_and_wv_stay_sharded_over_all_ranks(result_of: ResultOf, case: str) -> None:
    rows = [report["rows_of_wk"] for report in result_of(shared(case)).reports]
    # The four ranks of TP, or of FSDP x TP, hold a fourth each: nothing is kept whole.
    assert rows == [[shared(case).n_kv_heads * LINE.HEAD_DIM // 4] * len(rows[0])] * 4
    assert len(rows[0]) >= 2


@pytest.mark.long
def test_the_long_matrix(tmp_path: Path) -> None:
    run_cases(map(shared, LONG), tmp_path, done=assert_trains_like_one_process)


@pytest.mark.long
@pytest.mark.requires(torchtitan="0.3")
def test_what_inductor_compiles_trains_like_one_process(tmp_path: Path) -> None:
    run_cases([shared(text, ranks=2) for text in COMPILED], tmp_path, done=assert_trains_like_one_process)


@pytest.mark.parametrize("case", REFUSED)
def test_a_degree_that_does_not_fit_even_so_is_refused_on_every_rank(result_of: ResultOf, case: str) -> None:
    result = result_of(shared(case))
    assert result.truth == "refused", result
    assert len({report["message"] for report in result.reports}) == 1, result
    assert REFUSED[case] in result.reports[0]["message"], result
