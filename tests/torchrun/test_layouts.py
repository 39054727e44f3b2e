"""The recorded layouts: what they cover, why each came out as it did, and a few of them run again."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.forked import in_forks, run_script
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.rehearsal.truth import explained
from torchtitan_tp_validate.rehearsal.truth.explained import AGREES, UNEXPLAINED, count_kinds, explain
from torchtitan_tp_validate.rehearsal.truth.layouts import (
    Layout,
    Row,
    axes_of,
    not_repaired,
    pairs,
    pairs_of,
    read_rows,
    repaired,
)
from torchtitan_tp_validate.rehearsal.truth.shared_layouts import shared_layouts
from torchtitan_tp_validate.rules import FAULTS

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    line: ROOT / "tests" / "truth" / f"layouts-{line}.{micro}.csv" for line, micro in (("0.2", 2), ("0.3", 0))
}
ROWS = {line: read_rows(path) for line, path in TABLES.items()}
SHARED = {line: path.with_name(f"shared-{path.name}") for line, path in TABLES.items()}
SHARED["main"] = SHARED["0.3"].with_name("shared-layouts-main.csv")
TABLE_OF = {path.stem.partition("-")[2]: path for path in sorted(TABLES["0.2"].parent.glob("layouts-*.csv"))}
SHOWN = [
    (release, code)
    for release, path in TABLE_OF.items()
    for code in sorted({code for row in read_rows(path) for code in row.verdict.split() if code in FAULTS})
]
"""Release, and a fault that its recorded layouts show."""


@pytest.mark.parametrize("line", ROWS)
def test_every_layout_is_explained(line: str) -> None:
    assert [str(row.layout) for row in ROWS[line] if explain(line, row) == UNEXPLAINED] == []


@pytest.mark.parametrize("line", ROWS)
def test_the_table_says_why(line: str) -> None:
    with TABLES[line].open(encoding="utf-8", newline="") as stream:
        said = [values["explanation"] for values in csv.DictReader(stream)]
    assert said == [explain(line, row) for row in ROWS[line]]


@pytest.mark.parametrize("line", ROWS)
def test_no_layout_is_recorded_twice(line: str) -> None:
    assert max(Counter(row.layout for row in ROWS[line]).values()) == 1


@pytest.mark.parametrize("line", ROWS)
def test_every_two_values_that_go_together_are_together_in_a_layout(line: str) -> None:
    axes = axes_of(line)
    assert pairs(line) - {pair for row in ROWS[line] for pair in pairs_of(row.layout, axes)} == set()


@pytest.mark.parametrize("line", ROWS)
def test_the_figures_are_those_of_the_page(line: str) -> None:
    counts = [len(ROWS[line]), *count_kinds(line, ROWS[line])]
    row = f"| layouts of {line}.x | {' | '.join(map(str, counts))} |"
    assert row in (ROOT / "docs" / "truth.md").read_text(encoding="utf-8"), row


@pytest.mark.parametrize("line", SHARED)
def test_every_layout_with_shared_heads_trains_what_one_process_trains(line: str) -> None:
    rows = read_rows(SHARED[line])
    assert {row.layout for row in rows} >= {*shared_layouts(line)}
    assert {(row.verdict, row.outcome) for row in rows} == {("fits", "equal")}
    of = "main" if line == "main" else f"{line}.x"
    said = f"| layouts of {of} with shared heads | {len(rows)} | {len(rows)} | 0 |"
    assert said in (ROOT / "docs" / "kv-replication.md").read_text(encoding="utf-8"), said


def test_without_a_reason_a_layout_would_be_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    every = explained.REASONS
    for reason in every:
        monkeypatch.setattr(explained, "REASONS", tuple(one for one in every if one is not reason))
        assert any(explain(reason.line, row) == UNEXPLAINED for row in ROWS[reason.line]), reason


@pytest.mark.parametrize("line", ROWS)
def test_without_a_fault_a_layout_that_trains_wrong_would_be_let_through(line: str) -> None:
    needed = {code for row in ROWS[line] for code in row.verdict.split() if " " not in row.verdict}
    assert {code for code in needed if code in FAULTS} == FAULTS_NEEDED[line]


def steps(one: Layout, other: Layout) -> int:
    """Return in how many values two layouts differ."""
    values, others = asdict(one).values(), asdict(other).values()
    return sum(value != another for value, another in zip(values, others, strict=True))


@pytest.mark.parametrize(("release", "code"), SHOWN)
def test_ten_layouts_one_step_outside_of_a_fault_are_let_through_and_equal(release: str, code: str) -> None:
    rows = read_rows(TABLE_OF[release])
    shown = [row.layout for row in rows if code in row.verdict.split()]
    equal = [row.layout for row in rows if (row.verdict, row.outcome) == ("fits", "equal")]
    outside = [one for one in equal if any(steps(one, other) == 1 for other in shown)]
    # With its repair it is still in the layout that shows it.
    assert sum(code not in one.repaired for one in outside) >= 10


@pytest.mark.parametrize("release", TABLE_OF)
def test_what_is_refused_for_a_fault_equals_one_process_with_its_repair(release: str) -> None:
    rows = read_rows(TABLE_OF[release])
    assert not_repaired(rows) == []
    mended = {layout for row in rows if (layout := repaired(row)) is not None}
    found = {(row.verdict, row.outcome) for row in rows if row.layout in mended}
    assert found == {("fits", "equal")}


FAULTS_NEEDED = {
    "0.2": {"NUM001", "NUM002", "NUM003", "NUM008", "NUM009", "NUM010"},
    "0.3": {"NUM004", "NUM005", "NUM006", "NUM014", "NUM015"},
}
"""Line -> the faults that a recorded layout is refused for, and for nothing else."""


def test_what_is_refused_and_trains_all_the_same_has_no_explanation() -> None:
    (row, *_) = (row for row in ROWS["0.3"] if explain("0.3", row) == AGREES and row.outcome == "equal")
    values = {
        name: getattr(row, name)
        for name in ("layout", "outcome", "worst", "wrong", "stage", "error", "seconds")
    }
    assert explain("0.3", Row(verdict="TP001", **values)) == UNEXPLAINED


@in_forks
@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), marks=pytest.mark.requires(torchtitan=("0.2.2", "0.3.0"))),
        pytest.param(("--shared",), marks=pytest.mark.requires(torchtitan=("0.2.2", "0.3.0", "main"))),
    ],
)
def test_the_rules_say_of_every_layout_what_is_recorded(more: tuple[str, ...], tmp_path: Path) -> None:
    release = torchtitan_identity().name
    table = (SHARED if more else TABLES)[release.rpartition(".")[0] or release]
    shutil.copy(table, tmp_path)
    run_script("truth_layouts", "--judge", *more, "--out", str(tmp_path), out=tmp_path / "ended")
    assert (tmp_path / table.name).read_text() == table.read_text()


@in_forks
@pytest.mark.requires(torchtitan=("0.2.2", "0.3.0"))
def test_layouts_come_out_as_recorded(tmp_path: Path) -> None:
    lines = run_script("truth_layouts", "--again", "2", out=tmp_path)
    lines += run_script("truth_layouts", "--again", "1", "--shared", out=tmp_path / "shared")
    assert len(lines) >= 5
    assert all(line.startswith("as recorded: ") for line in lines), (version("torchtitan"), lines)
