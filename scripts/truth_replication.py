#!/usr/bin/env python
"""The truth suite of KV-head replication: what the engine says, and what happens without any check.

    scripts/truth_replication.py        a quarter of an hour; writes tests/truth/replication-RELEASE.csv

Tiny models of every family that it supports are trained with it at head counts that fit and at others, on
four ranks, and compared with TP = 1. The exit status is 0 without a miss or a false refusal.
"""

from __future__ import annotations

import csv
import tempfile
from importlib.metadata import version
from pathlib import Path

from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.runner import Result, run_cases
from torchtitan_tp_validate.rehearsal.truth.kv_replication import cases, parse, truth

TABLES = Path(__file__).resolve().parents[1] / "tests" / "truth"


def main() -> None:
    """Run all cases, judge them, and write the table."""
    line = installed_line()
    texts = {parse(text).key: text for family in line.SHARED_KV_HEADS for text in cases(family, line)}
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_cases(map(parse, texts.values()), Path(folder), done=lambda r: results.update({r.case.key: r}))
    table = TABLES / f"replication-{version('torchtitan')}.csv"
    wrong = 0
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("case", "verdict", "codes", "truth", "judgement", "detail"))
        for key, text in texts.items():
            result, seen = results[key], truth(text, results[key])
            agreed = (result.verdict == "refused") != seen.equal
            judgement = "agreed" if agreed else "false refusal" if seen.equal else "miss"
            wrong += not agreed
            ended = ("equal" if seen.equal else "broken", judgement, seen.detail)
            row = (text, result.verdict, " ".join(result.codes), *ended)
            writer.writerow(row)
            print(*row, sep=" | ")
    print(f"{len(texts)} cases, {len(texts) - wrong} agreed, {wrong} did not. Written to {table}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
