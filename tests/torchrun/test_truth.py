"""The truth suite tells apart every way in which a run can end, or its table would prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torchrun.conftest import ResultOf
from torchtitan_tp_validate.rehearsal import runner
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.runner import Result, result_from_dict, run_cases
from torchtitan_tp_validate.rehearsal.truth import report
from torchtitan_tp_validate.rehearsal.truth.cases import all_cases, small_cases

LINE = installed_line()
ALL_BACKENDS = sorted(
    {backend for backends in LINE.BACKENDS.values() for backend in backends if backend}
) or [None]

BY_EXPERTS = [
    case
    for case in all_cases(LINE, LINE.BACKENDS["qwen3_moe"][:1])
    if (case.family, case.tp, case.dp, case.ep) == ("qwen3_moe", 1, 2, 2)
]
SMALL = [
    case
    for case in small_cases(LINE, LINE.BACKENDS["qwen3"])
    if case.family == "qwen3" and case.dimension in ("control", "hidden", "n_kv_heads")
]
CASES = BY_EXPERTS + SMALL


def test_every_end_of_a_case_is_told_and_the_next_case_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PROGRAM", "tests.torchrun.fake_rank")
    # Nothing is imported but the forks.
    monkeypatch.setattr(runner, "PATIENCE_SECONDS", 20.0)
    ends = {
        "exception": "exception",
        "one rank different": "different",
        "out of step": "exception",
        "one rank raises": "hang",
        "equal": "equal",
        "hang": "hang",
        "crash": "crash",
    }
    cases = [Case("llama3", end, tp=2, seed=seed) for seed, end in enumerate([*ends, "equal"])]
    results: list[Result] = []
    run_cases(cases, tmp_path, done=results.append)
    assert [(r.case, r.truth) for r in results] == list(zip(cases, [*ends.values(), "equal"], strict=True))
    assert results[3].detail == "rank 0 raised ValueError: no; others wait"
    assert [result_from_dict(r.as_dict()) for r in results] == results


@pytest.mark.parametrize(
    ("verdict", "truth", "judgement"),
    [
        ("compatible", "equal", "agreed"),
        ("compatible", "different", "miss"),
        ("compatible", "hang", "miss"),
        ("refused", "exception", "agreed"),
        ("refused", "different", "agreed"),
        ("refused", "crash", "agreed"),
        ("refused", "equal", "false refusal"),
        ("not validated", "equal", "not validated"),
        ("crashed", "exception", "not validated"),
        ("", "invalid", "invalid"),
        ("compatible", "unstable", "unstable"),
    ],
)
def test_a_verdict_is_right_when_it_refuses_exactly_what_goes_wrong(
    verdict: str, truth: str, judgement: str
) -> None:
    result = Result(Case("llama3", "hidden", 2), verdict, (), "", truth)
    assert report.judgement(result) == judgement


def test_every_family_has_a_control_and_every_size_a_broken_case() -> None:
    cases = all_cases(LINE, ALL_BACKENDS)
    dimensions = {(case.family, case.dimension) for case in cases}
    for family in (*LINE.FAMILIES, *LINE.MORE_FAMILIES):
        assert {(family, name) for name in ("control", "n_heads", *LINE.SIZES[family])} <= dimensions
    assert len({case.key for case in cases}) == len(cases)


def agreed(result: Result) -> Result:
    """The result of a case on which our verdict is right."""
    assert report.judgement(result) == report.AGREED, (
        f"{result.case.key}: {result.verdict}, but {result.truth} ({result.detail})"
    )
    return result


def test_expert_parallelism_needs_a_number_of_experts_that_divides(result_of: ResultOf) -> None:
    truths = {(case.dimension, agreed(result_of(case)).truth) for case in BY_EXPERTS}
    assert {("control", "equal"), ("num_experts by EP", "exception")} <= truths


def test_a_small_part_of_the_truth_is_what_the_engine_says(result_of: ResultOf) -> None:
    """The whole suite is scripts/truth.py; here a family's controls, heads and feed-forward, really run."""
    truths = {(case.spmd_backend, case.dimension): agreed(result_of(case)).truth for case in SMALL}
    for backend in LINE.BACKENDS["qwen3"]:
        assert truths[backend, "control"] == "equal"
        assert truths[backend, "n_kv_heads"] == "exception"
        uneven = {None: "exception", "spmd_types": "different"}.get(backend, "equal")
        assert truths[backend, "hidden"] == uneven
