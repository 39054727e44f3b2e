"""What a terminal shows."""

from __future__ import annotations

import io
import sys

import pytest

from torchtitan_tp_validate.cli import output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
