"""What a terminal shows: progress and the coloured matrix."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from torchtitan_tp_validate.cli import output, reports
from torchtitan_tp_validate.cli.commands.table import matrix
from torchtitan_tp_validate.cli.verdicts import Judgement, Report, Status, as_json, exit_status, judge
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import ranges
from torchtitan_tp_validate.plans.huggingface import Framework, read


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(n_kv_heads: int, flavor: str = "8B", world_size: int | None = None) -> Report:
    content = {"num_attention_heads": 8, "num_key_value_heads": n_kv_heads, "num_hidden_layers": 2}
    plan = read(content, content, Degrees(tp=1), framework=Framework.TORCHTITAN)
    judgements = judge(plan, [Degrees(tp=2), Degrees(tp=4)], world_size)
    return Report(f"llama3 {flavor}", judgements, plan, group="llama3", listed=True)


def test_progress_is_drawn_on_standard_error_of_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with output.progress("Judging configs") as track:
        assert list(track([1, 2, 3])) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("Judging configs") as track:
        assert list(track([1, 2, 3])) == [1, 2, 3]
    assert "Judging configs" in terminal.getvalue()
    assert capsys.readouterr().out == ""


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


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([1, 2], "1, 2"), ([1, 2, 3, 4, 8], "1-4, 8"), ([2, 4, 8], "2, 4, 8")],
)
def test_ranges_of_degrees_in_few_words(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_the_exit_status_is_that_of_the_worst() -> None:
    fits = Report("a", (Judgement(Degrees(tp=2), None),))
    bad = Report("b", report(2).judgements, report(2).plan)
    skipped, unread = Report("c", note="why", skipped=True), Report("d", note="why")
    assert [r.status for r in (fits, bad, skipped, unread, report(2))] == [
        Status.COMPATIBLE,
        Status.INCOMPATIBLE,
        Status.SKIPPED,
        Status.NOT_VALIDATED,
        Status.LISTED,
    ]
    assert exit_status([fits, skipped]) == 0
    assert exit_status([fits, skipped, bad]) == 1
    assert exit_status([fits, bad, unread]) == 2


def test_a_rule_that_was_left_out_is_named_behind_every_verdict() -> None:
    whole = report(2)
    assert whole.plan is not None
    plan = replace(whole.plan, not_judged=("TP009: the run has no seq_len",))
    for degrees in ([Degrees(tp=2)], [Degrees(tp=4)], [Degrees(tp=2), Degrees(tp=4)]):
        one = Report("a", judge(plan, degrees), plan)
        assert reports.concise(one).endswith(" Not validated: TP009: the run has no seq_len.")
        text = "\n".join(line for line, _ in reports.verdicts([one]))
        assert text.count("Not validated: TP009: the run has no seq_len.") == 1
        assert as_json("check", [one])["results"][0]["not_judged"] == ["TP009: the run has no seq_len"]
    assert "Not validated" not in reports.concise(whole)
