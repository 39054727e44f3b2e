"""Stands in for `rehearsal.rank` in the runner's test: each case ends in the way that its dimension says."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.forks import OUT_OF_STEP, run_in_forks
from torchtitan_tp_validate.rehearsal.reports import Report, Verdict, append_report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = [Case(**data) for data in json.loads(options.cases.read_text(encoding="utf-8"))]

    def run(cases: Sequence[Case], attempt: int) -> NoReturn:
        del attempt
        for case in cases:
            end(case, int(os.environ["RANK"]), lambda **report: append_report(report, options.out))
        os._exit(0)

    run_in_forks(cases, options.out, run)


def end(case: Case, rank: int, write: Any) -> None:
    verdict, difference = Verdict("compatible"), {"loss_difference": 0.0, "gradient_difference": 0.0}
    report = asdict(Report(case.key, rank, verdict, stage="forward", worst_gradient="w", **difference))
    raised = {**report, "truth": "exception", "error_type": "ValueError", "message": "no"}
    match case.dimension:
        case "equal":
            write(**{**report, "truth": "equal", "final": True})
        case "exception":
            write(**{**raised, "final": True})
        case "one rank different":
            write(**{**report, "truth": "different" if rank else "equal", "final": True})
        case "out of step":
            write(**{**raised, "final": True})
            os._exit(0)
        case "one rank raises":
            if rank:
                time.sleep(600)
            write(**raised)
            os._exit(OUT_OF_STEP)
        case "hang":
            time.sleep(600)
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
