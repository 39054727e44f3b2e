"""The recorded set-ups: torchtitan's own Trainer and the rules agree on every random run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.forked import in_forks, run_script
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.rehearsal.truth.set_ups import SETS_UP, draw, read
from torchtitan_tp_validate.rules import RUN_RULES

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("0.2.2", "0.3.0", "main")
TABLES = {line: ROOT / "tests" / "truth" / f"set-ups-{line}.csv" for line in RELEASES}
ROWS = {line: read(path) for line, path in TABLES.items()}

pytestmark = pytest.mark.requires(torchtitan=RELEASES)


@pytest.mark.parametrize("line", ROWS)
def test_no_run_is_missed_and_none_is_falsely_refused(line: str) -> None:
    assert [row for row in ROWS[line] if row.is_missed or row.is_falsely_refused] == []
    assert sum(row.outcome == SETS_UP for row in ROWS[line]) > 100
    assert [row.run for row in ROWS[line]] == [
        one.run for one in draw(line.rpartition(".")[0] or line, len(ROWS[line]))
    ]


def test_there_are_a_thousand_of_them_and_every_rule_decides_some() -> None:
    assert sum(map(len, ROWS.values())) >= 1000
    broken = {code for rows in ROWS.values() for row in rows for code in row.verdict.split()}
    # Two are told, and two train on: `tests/core/test_layout.py` shows them.
    # Nothing is loaded in them, compiled or traced, and none validates; they have torchtitan's own data.
    elsewhere = {"CKPT002", "CKPT003", "CKPT004", "PP011", "PP012", "DATA001", "VAL002", "VAL003", "VAL004"}
    assert set(RUN_RULES) - broken == {"NODE001", "VAL001", "PP008", "MESH006", *elsewhere}


@in_forks
def test_the_rules_say_of_every_run_what_is_recorded(tmp_path: Path) -> None:
    table = TABLES[torchtitan_identity().name]
    shutil.copy(table, tmp_path)
    run_script("truth_set_ups", "--judge", "--out", str(tmp_path), out=tmp_path / "ended")
    assert (tmp_path / table.name).read_text() == table.read_text()


@in_forks
def test_runs_come_out_as_recorded(tmp_path: Path) -> None:
    assert run_script("truth_set_ups", "--again", "4", out=tmp_path) == ["as recorded"] * 8
