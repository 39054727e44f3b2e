"""What audit and table say of the memory of a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tests.core.cli.conftest import Program
from tests.core.cli.test_verdicts import report
from torchtitan_tp_validate.cli.commands.table import _fields, _plain
from torchtitan_tp_validate.cli.memory import with_memory
from torchtitan_tp_validate.cli.verdicts import Judgement, Report, Status, Verdicts, concise
from torchtitan_tp_validate.degrees import FLAGS, Degrees
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal import memory
from torchtitan_tp_validate.rehearsal.memory import State

GIB = 2**30


class Meter:
    """Lays out a model that takes 24 GiB in all, evenly."""

    def __init__(self, error: str = "") -> None:
        self.error = error

    def measure(self, degrees: Mapping[str, int], world_size: int) -> State:
        if self.error:
            raise RehearsalError(self.error)
        part = 24 * GIB // world_size * (2 if degrees.get(FLAGS["tp"]) == 2 else 1)
        return State(part // 4, part // 4, part // 2)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """What measures, in the place of torchtitan."""
    meter = Meter()

    @contextmanager
    def layout_meter(arguments: Any, **job: Any) -> Iterator[Meter]:
        assert (arguments, job) == ((), {"replicate_kv_heads": False, "model": "llama3", "flavor": "8B"})
        yield meter

    monkeypatch.setattr(memory, "layout_meter", layout_meter)
    return meter


def measured(found: Report, size: int | None) -> Report:
    options = SimpleNamespace(memory=size, world_size=8, replicate_kv_heads=False)
    return with_memory(found, options, lambda one: _fields(one, 8), model="llama3", flavor="8B")


def test_a_table_has_the_bytes_of_a_rank_in_the_place_of_yes(meter: Meter) -> None:
    found = measured(report(8), 5 * GIB)
    assert [judgement.mark for judgement in found.judgements] == ["-", "3.00"]
    assert str(found.judgements[0].error).startswith(
        "This run cannot work: the fullest rank holds 6.00 GiB, and has 5.00 GiB."
    )
    rows = [line.split() for line, _ in _plain([found], (2, 4), None)]
    assert rows[1][4:6] == ["-", "3.00"]
    table = Verdicts("table", (2, 4), memory=True)
    assert [text for text, _ in table.cells(found)][1:3] == ["no", "3.00"]
    held = table.item(found)["judgements"][1]["bytes_per_rank"]
    assert held == {"parameters": 3 * GIB // 4, "gradients": 3 * GIB // 4, "optimizer": 3 * GIB // 2}


def test_what_does_not_fit_otherwise_is_not_measured(meter: Meter) -> None:
    assert [judgement.mark for judgement in measured(report(2), 8 * GIB).judgements] == ["6.00", "-"]
    unmeasured = report(2)
    assert measured(unmeasured, None) is unmeasured


def test_an_audit_has_a_column_of_it(meter: Meter) -> None:
    run = Report("8b", (Judgement(Degrees(tp=4), None),), report(8).plan)
    fits, too_much = measured(run, 3 * GIB), measured(run, 2 * GIB)
    verdicts = Verdicts("audit", memory=True)
    assert verdicts.columns[:4] == ["name", "asked for", "verdict", "GiB per rank"]
    for one, cells in ((fits, ["fits", "3.00"]), (too_much, ["does not fit", "3.00"])):
        assert [text for text, _ in verdicts.cells(one)][2:4] == cells
    for one in (fits, Report("a", note="why"), Report("b", plan=run.plan)):
        assert len(list(verdicts.cells(one))) == len(verdicts.columns)
    assert " 3.00 GiB per rank." in concise(fits)
    assert too_much.status is Status.INCOMPATIBLE


def test_what_cannot_be_laid_out_is_not_passed(meter: Meter) -> None:
    meter.error = "the job cannot be laid out: ValueError: no"
    found = measured(report(8), GIB)
    assert found.status is Status.NOT_VALIDATED
    assert found.note == "Not validated: the job cannot be laid out: ValueError: no."


@pytest.mark.parametrize("command", ["audit", "table"])
def test_the_number_of_ranks_is_wanted(tp_validate: Program, command: str) -> None:
    status, _, err = tp_validate(command, "--memory", "80GiB")
    assert status == 2
    assert "--memory wants --world-size: how many ranks are there?" in err
