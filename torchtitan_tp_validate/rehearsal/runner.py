"""Run cases under torchrun, whatever they do: raise, hang, or take a rank down.

All cases share a torchrun, which has as many ranks as the largest needs. They can tell when one of them does
not end a case; when none of them does, they all stop making progress, and the torchrun is ended here. The
next one starts behind that case if it came first, or right after one that was equal to TP = 1: nothing
before it can be blamed then. Any other is run again, in a torchrun that starts with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.reports import (
    CRASH,
    EQUAL,
    HANG,
    WORST_FIRST,
    final_reports,
    read_reports,
)
from torchtitan_tp_validate.rehearsal.torchrun import Torchrun, run_torchrun

PROGRAM = "torchtitan_tp_validate.rehearsal.rank"
# For a case, and for Python and torch to start. Ranks that notice that another one does not follow end
# much earlier.
PATIENCE_SECONDS = 180.0


@dataclass(frozen=True)
class Result:
    """A case, our verdict on it, and what it really does.

    Attributes:
        verdict: ``compatible``, ``refused``, ``not validated`` or ``crashed``; "" when there is none.
        truth: the worst of what the ranks say of it, see `reports.Report`.
        stage: how far the run came; detail: what it raised, or how far off it was.
        seconds: what the case took on its slowest rank; 0 for a hang.
        reports: those of its ranks, in their order; of a case that some rank did not end, of those that did.
    """

    case: Case
    verdict: str
    codes: tuple[str, ...]
    verdict_text: str
    truth: str
    stage: str = ""
    detail: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    reports: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data, without the reports."""
        return {**asdict(replace(self, reports=())), "case": self.case.as_dict(), "key": self.case.key}


def result_from_dict(data: Mapping[str, Any]) -> Result:
    """Return the result that `Result.as_dict` was of."""
    fields = {name: value for name, value in data.items() if name != "key"}
    fields |= {"case": Case(**data["case"]), "codes": tuple(data["codes"]), "reports": ()}
    return Result(**fields)


def run_cases(cases: Iterable[Case], out: Path, *, done: Callable[[Result], None]) -> None:
    """Run all cases and hand each result to ``done`` as soon as it is there.

    Args:
        out: where each torchrun gets a folder for its output and reports.
    """
    number = 0
    waiting = sorted(cases, key=_order)
    while waiting:
        number += 1
        batch = _Batch(waiting, out / f"torchrun-{number:03}", done)
        waiting = waiting[batch.run() :]


def _order(case: Case) -> tuple[Any, ...]:
    """Put together cases that share a guard, and of those such that share the run in one process."""
    return (
        case.world_size,
        case.guard,
        case.replicate_kv_heads,
        case.in_one_process.key,
        case.meshes,
    )


class _Batch:
    """One torchrun over some cases, and how far it came."""

    def __init__(self, cases: Sequence[Case], out: Path, done: Callable[[Result], None]) -> None:
        self._cases = cases
        self._out = out
        self._done = done
        self._ended = 0
        self._in_step = True
        self._progress: float | None = None

    def run(self) -> int:
        """Run to the end or to the first case that does not end; how many cases are settled now."""
        self._out.mkdir(parents=True, exist_ok=True)
        for stale in (*self._out.glob("rank*"), *self._out.glob("attempt*")):
            stale.unlink()
        cases = self._out / "cases.json"
        cases.write_text(json.dumps([case.as_dict() for case in self._cases]), encoding="utf-8")
        torchrun = run_torchrun(
            ["--cases", str(cases), "--out", str(self._out)],
            nproc=max(case.world_size for case in self._cases),
            timeout=PATIENCE_SECONDS * len(self._cases),
            out=self._out,
            module=PROGRAM,
            watch=self._watch,
        )
        self._collect()
        stopped = torchrun.timed_out or torchrun.returncode != 0
        if stopped and self._in_step and self._ended < len(self._cases):
            self._done(self._never_ended(self._cases[self._ended], torchrun))
            return self._ended + 1
        if torchrun.leftover and not stopped:
            raise RuntimeError(f"processes outlived their torchrun\n{torchrun}")
        if not self._ended:
            raise RuntimeError(f"torchrun did not run {self._cases[0].key}\n{torchrun}")
        return self._ended

    def _watch(self) -> bool:
        """Collect what has ended; whether something has lately."""
        # The clock starts with the first call, since a run may have waited for another.
        if self._collect() or self._progress is None:
            self._progress = time.monotonic()
        return time.monotonic() - self._progress < PATIENCE_SECONDS

    def _collect(self) -> int:
        """Hand on the cases that have ended on every rank since the last call; how many there were."""
        before = self._ended
        new = final_reports(self._cases, self._out)[before:]
        for case, reports in zip(self._cases[before:], new, strict=False):
            result = _merge(case, reports)
            self._done(result)
            # A hang or a crash is followed by new forks.
            self._in_step = result.truth in (EQUAL, HANG, CRASH)
            self._ended += 1
        return len(new)

    def _never_ended(self, case: Case, torchrun: Torchrun) -> Result:
        """Return what is known of a case that some rank did not end."""
        ranks = range(case.world_size)
        reports = [r for rank in ranks for r in read_reports(self._out, rank) if r["key"] == case.key]
        if not any(self._out.glob("rank*.jsonl")):
            raise RuntimeError(f"no rank of torchrun got as far as {case.key}\n{torchrun}")
        return _stopped(case, reports, HANG if reports or torchrun.timed_out else CRASH)


def _merge(case: Case, reports: Sequence[Mapping[str, Any]]) -> Result:
    """One result of what all ranks reported; the worst of their answers counts."""
    report = min(reports, key=lambda r: WORST_FIRST.index(r["truth"]))
    if report["truth"] in (CRASH, HANG):
        return _stopped(case, [r for r in reports if r["truth"] not in (CRASH, HANG)], report["truth"])
    verdict = report["verdict"] or {}
    words = {(r["verdict"] or {}).get("word", "") for r in reports}
    if len(words) > 1:
        raise AssertionError(f"{case.key}: ranks were told different verdicts: {sorted(words)}")
    return Result(
        case=case,
        verdict=verdict.get("word", ""),
        codes=tuple(verdict.get("codes", ())),
        verdict_text=verdict.get("text", ""),
        truth=report["truth"],
        stage=report["stage"],
        detail=_detail(report),
        seconds=round(max(r["seconds"] for r in reports), 2),
        reports=tuple(reports),
    )


def _stopped(case: Case, reports: Sequence[Mapping[str, Any]], truth: str) -> Result:
    """Return what is known of a case that some rank did not end, from the ranks that did."""
    # The quickest is the cause: the others raise when its process is gone.
    raised = sorted((r for r in reports if r["error_type"]), key=lambda r: r["seconds"])[:1]
    detail = f"rank {raised[0]['rank']} raised {_line(raised[0])}; others wait" if raised else ""
    verdict = next((r["verdict"] for r in reports if r["verdict"]), None) or {}
    return Result(
        case=case,
        verdict=verdict.get("word", ""),
        codes=tuple(verdict.get("codes", ())),
        verdict_text=verdict.get("text", ""),
        truth=truth,
        stage=raised[0]["stage"] if raised else "",
        detail=detail
        or f"{case.world_size - len({r['rank'] for r in reports})} of {case.world_size} ranks never ended",
        reports=tuple(reports),
    )


def _detail(report: Mapping[str, Any]) -> str:
    if report["error_type"] is not None:
        return _line(report)
    if report["loss_difference"] is None:
        return ""
    loss, gradient = report["loss_difference"], report["gradient_difference"]
    reshaped = f"; {report['message']}" if report["message"] else ""
    return f"loss off by {loss:.1e}, gradient of {report['worst_gradient']} by {gradient:.1e}{reshaped}"


def _line(report: Mapping[str, Any]) -> str:
    message = " ".join(report["message"].split())
    return f"{report['error_type']}: {message[:200]}"
