"""The truth suite tells apart every way in which a run can end, or its table would prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torchrun import lines, truth_cases, truth_report, truth_runner
from tests.torchrun.truth_cases import Case
from tests.torchrun.truth_runner import Result, result_from_dict, run_cases


def test_every_end_of_a_case_is_told_and_the_next_case_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truth_runner, "PROGRAM", "tests.torchrun.fake_truth")
    monkeypatch.setattr(truth_runner, "PATIENCE_SECONDS", 30.0)
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
    assert truth_report.judgement(result) == judgement


def test_every_family_has_a_control_and_every_size_a_broken_case() -> None:
    line = lines.installed_line()
    backends = sorted({b for found in getattr(line, "BACKENDS", {}).values() for b in found}) or [None]
    cases = truth_cases.all_cases(line, backends)
    dimensions = {(case.family, case.dimension) for case in cases}
    for family in (*line.FAMILIES, *line.MORE_FAMILIES):
        assert {(family, name) for name in ("control", "n_heads", *line.SIZES[family])} <= dimensions
    assert len({case.key for case in cases}) == len(cases)


def agreed(cases: list[Case], out: Path) -> list[Result]:
    """The results of running these, when our verdict is right on each of them."""
    results: list[Result] = []
    run_cases(cases, out, done=results.append)
    wrong = [r for r in results if truth_report.judgement(r) != truth_report.AGREED]
    assert not wrong, "\n".join(f"{r.case.key}: {r.verdict}, but {r.truth} ({r.detail})" for r in wrong)
    return results


def test_expert_parallelism_needs_a_number_of_experts_that_divides(tmp_path: Path) -> None:
    line = lines.installed_line()
    backend = getattr(line, "BACKENDS", {}).get("qwen3_moe", (None,))[0]
    cases = [
        case
        for case in truth_cases.all_cases(line, (backend,))
        if (case.family, case.tp, case.dp, case.ep) == ("qwen3_moe", 1, 2, 2)
    ]
    truths = {(result.case.dimension, result.truth) for result in agreed(cases, tmp_path)}
    assert {("control", "equal"), ("num_experts by EP", "exception")} <= truths


def test_a_small_part_of_the_truth_is_what_the_engine_says(tmp_path: Path) -> None:
    """The whole suite is scripts/truth.py; here a family's controls, heads and feed-forward, really run."""
    line = lines.installed_line()
    backends = getattr(line, "BACKENDS", {}).get("qwen3") or (None,)
    cases = [
        case
        for case in truth_cases.small_cases(line, backends)
        if case.family == "qwen3" and case.dimension in ("control", "hidden", "n_kv_heads")
    ]
    results = agreed(cases, tmp_path)
    truths = {(r.case.spmd_backend, r.case.dimension): r.truth for r in results}
    assert {b for b, _ in truths} == set(backends)
    for backend in backends:
        assert truths[backend, "control"] == "equal"
        assert truths[backend, "n_kv_heads"] == "exception"
        uneven = {None: "exception", "spmd_types": "different"}.get(backend, "equal")
        assert truths[backend, "hidden"] == uneven
