"""The forks that the ranks run the cases in.

A case can leave its process waiting for ever. So each rank that torchrun starts only imports, once, and
forks; the fork runs cases and appends to ``OUT/rank{RANK}.jsonl`` until it has run all, or cannot go on. Then
all ranks fork again behind the case that ended it. Importing takes longer than most cases.

Ranks agree through files: they are on one machine, and one of them may be stuck in anything else.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.reports import (
    CRASH,
    EQUAL,
    HANG,
    Report,
    append_report,
    final_reports,
    read_reports,
)

OUT_OF_STEP = 3
"""Exit status of a fork that has seen another rank not end a case."""


def run_in_forks(cases: Sequence[Case], out: Path, run: Callable[[Sequence[Case], int], NoReturn]) -> None:
    """Run all cases, in as many forks of this rank as it takes; a case needs its first ranks only.

    Args:
        run: takes cases for the same number of ranks, which is in the environment, and the number of the
            fork. It runs one case or more, appends reports, and exits: with status 0 when what is left is
            for the next fork; with `OUT_OF_STEP` when another rank does not end a case.
    """
    start = attempt = 0
    while start < len(cases):
        child = os.fork()
        if not child:
            _run_as_rank(cases[start:], attempt, run)
        status = _wait_for_all(child, out, attempt)
        start = _settle(cases, start, status, out)
        attempt += 1


def _run_as_rank(
    cases: Sequence[Case], attempt: int, run: Callable[[Sequence[Case], int], NoReturn]
) -> NoReturn:
    """Run the cases that take as many ranks as the first, if this is one of them."""
    world_size = cases[0].world_size
    if int(os.environ["RANK"]) >= world_size:
        os._exit(0)
    os.environ["WORLD_SIZE"] = str(world_size)
    run(list(takewhile(lambda case: case.world_size == world_size, cases)), attempt)


def _wait_for_all(child: int, out: Path, attempt: int) -> int:
    """Return the worst exit status of the forks of all ranks, when they have ended.

    One that may be waiting for a rank that has given up is ended.
    """
    ends = [out / f"attempt{attempt}-rank{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
    mine = ends[int(os.environ["RANK"])]
    status = None
    while True:
        if status is None:
            pid, wait_status = os.waitpid(child, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(wait_status)
                _write_whole(mine, str(status))
        statuses = [int(end.read_text(encoding="utf-8")) for end in ends if end.exists()]
        if len(statuses) == len(ends):
            return max(statuses, key=lambda one: (one not in (0, OUT_OF_STEP), one))
        if status is None and OUT_OF_STEP in statuses:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = 0
            _write_whole(mine, str(status))
        time.sleep(0.05)


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.rename(path)


def _settle(cases: Sequence[Case], start: int, status: int, out: Path) -> int:
    """Return where the next fork starts.

    A case that ended a fork is settled when nothing before it can be blamed: it came first, or right after
    one that was equal to TP = 1.
    """
    if status > 0 and status != OUT_OF_STEP:
        raise RuntimeError(f"a fork failed with status {status}, in no case that it reports")
    ended = final_reports(cases, out)
    in_step = len(ended) == start or {report["truth"] for report in ended[-1]} == {EQUAL}
    if status and in_step and len(ended) < len(cases):
        key, rank = cases[len(ended)].key, int(os.environ["RANK"])
        never_ended = asdict(Report(key, rank, truth=HANG if status == OUT_OF_STEP else CRASH))
        mine = [report for report in read_reports(out, rank) if report["key"] == key]
        append_report({**(mine[-1] if mine else never_ended), "final": True}, out)
        return len(ended) + 1
    if len(ended) == start:
        raise RuntimeError(f"a fork ended with status {status}, but without a case: {cases[start].key}")
    return len(ended)
