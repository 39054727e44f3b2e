"""What a refusing rank prints, and what it leaves for torchrun's failure summary."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from torchtitan_tp_validate import failure, train
from torchtitan_tp_validate.errors import KVReplicationError, TPDegreeError
from torchtitan_tp_validate.validate import validate_tp_compat

CONFIG = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}


def refusal() -> ValueError:
    with pytest.raises(ValueError, match="must divide") as raised:
        validate_tp_compat(CONFIG, 4)
    return raised.value


def recorded(file: Path, monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int) -> dict[str, Any]:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    failure._write(str(file), refusal())  # type: ignore[arg-type]
    content: dict[str, Any] = json.loads(file.read_text())["message"]
    return content


def test_the_failure_summary_has_the_text_once_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun shows ``py_callstack``, or the message where there is none, of every rank of a node."""
    error = refusal()
    first = recorded(tmp_path / "error.json", monkeypatch, 8, 0)
    assert first["message"] == f"TPCompatError: {error}"
    other = recorded(tmp_path / "error.json", monkeypatch, 11, 3)
    headline = str(error).splitlines()[0]
    assert other["message"] == f"TPCompatError: {headline} (in full: rank 8)"
    for content in (first, other):
        assert set(content["extraInfo"]) == {"timestamp"}
    # The earliest is called the root cause.
    assert int(first["extraInfo"]["timestamp"]) <= int(other["extraInfo"]["timestamp"])


class Stream(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_rank_speaks_in_one_write(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    """Ranks share a stream: what is written in pieces may end up on a line of another."""
    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(train, "stop_without_torchtitan", lambda: None)
    monkeypatch.setattr(train, "install", lambda **_: None)
    monkeypatch.setattr(train, "parse_command_line", lambda: None)

    def refuse(_: Any) -> None:
        raise refusal()

    monkeypatch.setattr(train, "recorded_check", refuse)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 1
    headline = str(refusal()).splitlines()[0]
    assert stream.writes == [f"{refusal()}\n" if rank == "0" else f"[rank 3] {headline}\n"]


@pytest.mark.parametrize("error", [TPDegreeError("no degree"), KVReplicationError("no such thing")])
def test_every_mistake_of_the_user_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: ValueError
) -> None:
    def refuse(_: Any) -> None:
        raise error

    for name in ("stop_without_torchtitan", "parse_command_line"):
        monkeypatch.setattr(train, name, lambda: None)
    monkeypatch.setattr(train, "install", lambda **_: None)
    monkeypatch.setattr(train, "recorded_check", refuse)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert (stop.value.code, capsys.readouterr().err) == (1, f"{error}\n")
