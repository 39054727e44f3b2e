"""When ranks are taken to hang."""

from __future__ import annotations

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


def test_a_rank_that_computes_for_longer_than_the_patience_is_waited_for(tmp_path: Path) -> None:
    assert _ends(tmp_path, lambda: _compute(3 * PATIENCE_SECONDS)) == ["ended", "ended"]


def test_ranks_that_all_wait_hang(tmp_path: Path) -> None:
    assert _ends(tmp_path, lambda: time.sleep(60)) == ["hung", "hung"]


def test_a_rank_that_computes_without_an_end_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_MOST_PATIENCES", 2)
    assert _ends(tmp_path, lambda: _compute(60)) == ["hung", "hung"]
