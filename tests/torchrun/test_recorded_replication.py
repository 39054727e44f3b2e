"""The engine against the truth of KV-head replication as `scripts/truth_replication.py` recorded it."""

from __future__ import annotations

import csv
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from torchtitan_tp_validate.rehearsal.parallelize import judge_case
from torchtitan_tp_validate.rehearsal.truth.kv_replication import parse

TABLE = Path(__file__).parents[1] / "truth" / f"replication-{version('torchtitan')}.csv"
if not TABLE.exists():
    pytest.skip(f"no truth is recorded for torchtitan {version('torchtitan')}", allow_module_level=True)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_engine_refuses_exactly_what_broke(rows: list[dict[str, str]], line: ModuleType) -> None:
    assert len(rows) >= 40
    for row in rows:
        verdict = judge_case(line, parse(row["case"]))
        assert verdict.word == ("refused" if row["truth"] == "broken" else "compatible"), row
        assert " ".join(verdict.codes) == row["codes"], row


def test_every_rule_of_replication_is_needed(rows: list[dict[str, str]]) -> None:
    broken = [row["codes"] for row in rows if row["truth"] == "broken"]
    for code in ("TP001", "TP002", "TP014"):
        assert code in broken, f"no recorded case is refused by {code} alone"
