"""The engine against the truth as the last full run of the truth suite recorded it, in tests/truth.

Nothing is trained here: each model is built on meta and judged again, so that a rule that is lost, or a
new one that refuses what works, is seen in seconds.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from torchtitan_tp_validate.plan import PlanBuilder
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.parallelize import judge_case
from torchtitan_tp_validate.rehearsal.runner import Result
from torchtitan_tp_validate.rehearsal.truth import report
from torchtitan_tp_validate.rules import RULES

RELEASE = version("torchtitan")
TABLE = Path(__file__).parents[1] / "truth" / f"truth-{RELEASE}.csv"
if not TABLE.exists():
    pytest.skip(f"no truth is recorded for torchtitan {RELEASE}", allow_module_level=True)

# Rules that no recorded case needs, and where they are proved instead.
PROVED_ELSEWHERE = {
    "TP012": "no model of torchtitan's own has such a parameter: tests/torchtitan/test_plans_0_3.py",
    "TP004": "value heads are a multiple of key heads: tests/core/test_validate.py",
    "TP013": "the cases run on the CPU, without the grouped kernel: tests/torchtitan/test_experts.py",
    "TP015": "no CPU has the low-precision products: tests/torchtitan/test_jobs_0_3.py",
    "TP014": "only under KV-head replication: test_recorded_replication.py",
}
DIMENSIONS_OF_0_3 = {"TP003", "TP004", "TP007", "TP008"}
"""0.2.x has none of them."""


def recorded() -> list[Result]:
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return [_result(row) for row in csv.DictReader(stream)]


def _result(row: dict[str, str]) -> Result:
    case = Case(
        row["family"],
        row["dimension"],
        int(row["tp"]),
        int(row["n_heads"]),
        int(row["n_kv_heads"]),
        {name: int(size) for name, size in (pair.split("=") for pair in row["sizes"].split())},
        row["backend"] or None,
        int(row["seed"]),
        int(row["dp"]),
        int(row["ep"]),
        etp=int(row["etp"]),
    )
    return Result(
        case, row["verdict"], tuple(row["codes"].split()), "", row["truth"], versions={"torchtitan": RELEASE}
    )


@pytest.fixture(scope="module")
def rejudged(line: ModuleType) -> list[Result]:
    results = []
    for result in recorded():
        if result.truth not in (report.INVALID, report.UNSTABLE):
            verdict = judge_case(line, result.case)
            results.append(replace(result, verdict=verdict.word, codes=tuple(verdict.codes)))
    return results


def test_no_recorded_case_is_missed_and_none_refused_falsely(rejudged: list[Result]) -> None:
    assert len(rejudged) >= 150
    wrong = [
        f"{result.case.key}: {result.verdict} {result.codes}, but {result.truth}"
        for result in rejudged
        if report.judgement(result) not in (report.AGREED, report.BY_DECISION)
    ]
    assert wrong == []


def test_both_verdicts_are_recorded_for_every_family(rejudged: list[Result], line: ModuleType) -> None:
    seen = {(result.case.family, result.verdict) for result in rejudged}
    for family in (*line.FAMILIES, *line.MORE_FAMILIES):
        assert {(family, "compatible"), (family, "refused")} <= seen


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            code, marks=[pytest.mark.requires(torchtitan="0.3")] if code in DIMENSIONS_OF_0_3 else []
        )
        for code in RULES
    ],
)
def test_without_the_rule_a_recorded_case_would_be_missed(
    rejudged: list[Result], line: ModuleType, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    if code in PROVED_ELSEWHERE:
        pytest.skip(PROVED_ELSEWHERE[code])
    dims = PlanBuilder.dims
    monkeypatch.setattr(PlanBuilder, "dims", lambda self: tuple(d for d in dims(self) if d.code != code))
    needs_it = (result for result in rejudged if result.codes == (code,) and result.truth != "equal")
    result = next(needs_it, None)
    assert result is not None, f"every case that {code} refuses is refused by another rule too"
    verdict = judge_case(line, result.case)
    assert verdict.word == "compatible", result.case.key
