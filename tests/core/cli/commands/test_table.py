"""The colored matrix of a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from tests.core.cli.test_verdicts import report
from torchtitan_tp_validate.cli import output
from torchtitan_tp_validate.cli.commands.table import matrix


def test_the_matrix_shows_everything_however_narrow_the_terminal() -> None:
    table = matrix([report(8), report(2, "debugmodel_with_a_long_name")], (2, 4), None)
    console = Console(file=io.StringIO(), width=20, record=True, force_terminal=True)
    console.width = output.width_of(table, console)
    console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["llama3", "8B", "8", "8", "\u25cf", "\u25cf", "TP001", "num_attention_heads", "=", "8"] in lines
    row = next(line for line in lines if "debugmodel_with_a_long_name" in line)
    assert row[1:5] == ["8", "2", "\u25cf", "\u25cb"]


def test_the_matrix_greys_out_what_the_world_does_not_hold() -> None:
    table = matrix([report(8, world_size=2)], (2, 4), 2)
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(table)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[32m\u25cf" in drawn  # green
    assert "\x1b[90m\u25cf" in drawn  # grey
    assert "grey: does not divide 2 ranks" in drawn
