#!/usr/bin/env python
"""Set up random runs by torchtitan's Trainer, and compare with the verdicts: ``tests/truth/set-ups-*.csv``.

    scripts/truth_set_ups.py              every run that is not recorded yet
    scripts/truth_set_ups.py --judge      set up nothing: judge again what is recorded
    scripts/truth_set_ups.py --again 5    set up 5 of those that fit and 5 of the others again, and compare

The exit status is 0 when no run is missed, and none falsely refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.rehearsal.jobs import installed_line
from torchtitan_tp_validate.rehearsal.truth.set_ups import Runner, SetUp, draw, read, write

TABLES = Path(__file__).resolve().parents[1] / "tests" / "truth"
NUMBERS = {"0.2": 500, "0.3": 600, "main": 225}


def main() -> None:
    """Set up what is not recorded, and report."""
    options = _parse()
    release = torchtitan_identity().name
    line = release.rpartition(".")[0] or release
    table = options.out / f"set-ups-{release}.csv"
    recorded = {row.run: row for row in read(table)} if table.exists() else {}
    runner = Runner(installed_line())
    if options.again:
        sys.exit(_run_again(runner, recorded.values(), options.again))
    drawn = draw(line, NUMBERS[line])
    if options.judge:
        recorded = {run: replace(row, verdict=runner.judge(row)) for run, row in recorded.items()}
        write(table, recorded.values())
    else:
        left = [one for one in drawn if one.run not in recorded]
        for one in tqdm(left):
            recorded[one.run] = runner.run(one)
            write(table, (recorded[other.run] for other in drawn if other.run in recorded))
    wrong = [row for row in recorded.values() if row.is_missed or row.is_falsely_refused]
    counts = Counter("fits" if row.verdict == "fits" else "refused" for row in recorded.values())
    print(f"{len(recorded)} runs: {counts['fits']} fit, {counts['refused']} are refused; wrong: {len(wrong)}")
    for row in wrong:
        print(row)
    sys.exit(1 if wrong or len(recorded) < len(drawn) else 0)


def _run_again(runner: Runner, rows: Iterable[SetUp], count: int) -> int:
    """Set up recorded runs again; return how many come out in another way."""
    fits = [row for row in rows if row.verdict == "fits"][:count]
    others = [row for row in rows if row.verdict != "fits"][:count]
    changed = 0
    for row in (*fits, *others):
        again = runner.run(row)
        same = (again.verdict, again.outcome) == (row.verdict, row.outcome)
        changed += not same
        print("as recorded" if same else f"CHANGED: {row} is now {again.verdict}: {again.outcome}")
    return changed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", action="store_true", help="set up nothing")
    parser.add_argument("--again", type=int, metavar="N", help="set up N of either kind again")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the table")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
