#!/usr/bin/env python
"""The truth suite of KV-head replication: what the engine says, and what happens without any check.

    scripts/truth_replication.py        a quarter of an hour; writes tests/truth/replication-RELEASE.csv

Tiny models of every family that it supports are trained with it at head counts that fit and at others, on
four ranks, and compared with TP = 1. The exit status is 0 without a miss or a false refusal.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.torchrun import lines  # noqa: E402
from tests.torchrun.harness import run_torchrun  # noqa: E402
from tests.torchrun.replication_truth import RANKS, cases, refused, truth  # noqa: E402

TIMEOUT = 600


def main() -> None:
    """Run all cases, judge them, and write the table."""
    line = lines.installed_line()
    families = (*line.FAMILIES, *(("qwen3_moe", "gpt_oss") if hasattr(line, "UPSTREAM_CHECKS") else ()))
    reports = {case: seen for family in families for case, seen in run(cases(family, line)).items()}
    line.prepare("cpu")
    table = ROOT / "tests" / "truth" / f"replication-{version('torchtitan')}.csv"
    wrong = 0
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("case", "verdict", "codes", "truth", "judgement", "detail"))
        for case, seen_by_ranks in reports.items():
            seen = truth(case, seen_by_ranks)
            codes = refused(case, line)
            agreed = bool(codes) != seen.equal
            judgement = "agreed" if agreed else "false refusal" if codes else "miss"
            wrong += not agreed
            verdict = "refused" if codes else "compatible"
            row = (case, verdict, codes, "equal" if seen.equal else "broken", judgement, seen.detail)
            writer.writerow(row)
            print(*row, sep=" | ")
    print(f"{len(reports)} cases, {len(reports) - wrong} agreed, {wrong} did not. Written to {table}")
    raise SystemExit(1 if wrong else 0)


def run(chosen: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank reports of it, from one torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--case", *chosen, "--out", folder]
        result = run_torchrun(
            arguments, nproc=RANKS, timeout=TIMEOUT, out=Path(folder), module="tests.torchrun.replication"
        )
    reports = {case: [report for report in result.reports if report["case"] == case] for case in chosen}
    unfinished = [case for case, seen in reports.items() if len(seen) < RANKS]
    if len(unfinished) > 1:
        # The first may hang; the others were never begun, and tell nothing.
        raise SystemExit(f"not run behind {unfinished[0]}: {', '.join(unfinished[1:])}\n{result.output}")
    return reports


if __name__ == "__main__":
    main()
