"""When ranks begin, and when they are taken to hang."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchtitan_tp_validate.rehearsal import children
from torchtitan_tp_validate.rehearsal.children import Children

PATIENCE_SECONDS = 1.0


def _compute(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def _ends(out: Path, second: Callable[[], None]) -> list[str]:
    """How two ranks end of which the first waits for the second."""

    def run(rank: int, enter: Callable[[str], None]) -> None:
        enter("forward")
        if rank:
            second()
        else:
            while not (out / "run-rank1.json").exists():
                time.sleep(0.01)
        (out / f"run-rank{rank}.json").touch()

    return [end.how for end in Children(out, PATIENCE_SECONDS).run("run", 2, run)]


def test_no_rank_begins_before_the_last_is_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, forked = os.fork, []

    def slow_fork() -> int:
        time.sleep(0.2)
        pid = fork()
        forked.append(time.monotonic())
        return pid

    def run(rank: int, enter: Callable[[str], None]) -> None:
        (tmp_path / f"run-rank{rank}.json").write_text(str(time.monotonic()), encoding="utf-8")

    monkeypatch.setattr(os, "fork", slow_fork)
    ends = Children(tmp_path, PATIENCE_SECONDS).run("run", 3, run)
    assert [end.how for end in ends] == ["ended"] * 3
    began = [float((tmp_path / f"run-rank{rank}.json").read_text(encoding="utf-8")) for rank in range(3)]
    assert min(began) > max(forked)


def test_a_rank_that_computes_for_longer_than_the_patience_is_waited_for(tmp_path: Path) -> None:
    assert _ends(tmp_path, lambda: _compute(3 * PATIENCE_SECONDS)) == ["ended", "ended"]


def test_ranks_that_all_wait_hang(tmp_path: Path) -> None:
    assert _ends(tmp_path, lambda: time.sleep(60)) == ["hung", "hung"]


def test_a_rank_that_computes_without_an_end_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_MOST_PATIENCES", 2)
    assert _ends(tmp_path, lambda: _compute(60)) == ["hung", "hung"]
