#!/usr/bin/env python
"""The truth of layouts: what our verdict says of each, and what torchtitan's own Trainer makes of it.

    scripts/truth_layouts.py            every layout of the installed torchtitan that is not recorded yet,
                                        and one of what is refused for the same faults, repaired of them
    scripts/truth_layouts.py --part 20  the first 20 of these
    scripts/truth_layouts.py --shared   instead of these, the layouts with shared key-value heads
    scripts/truth_layouts.py --judge    run nothing: judge again what is recorded
    scripts/truth_layouts.py --again 2  run 2 of each outcome again, the quickest, and compare
    scripts/truth_layouts.py --mended   in a torchtitan with the patches: what is refused for faults is to fit

Each is a rehearsal of a small model on the CPU, over gloo. They are recorded one by one in
OUT/layouts-VERSION.csv, or OUT/shared-layouts-VERSION.csv. The exit status is 0 when all that is recorded is
explained.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.rehearsal.truth.explained import KINDS, UNEXPLAINED, count_kinds, explain
from torchtitan_tp_validate.rehearsal.truth.layout_runs import judge_layouts, run_layouts
from torchtitan_tp_validate.rehearsal.truth.layouts import (
    Layout,
    Row,
    is_of,
    layouts,
    not_repaired,
    read_rows,
    repaired,
    stock,
    write_rows,
)
from torchtitan_tp_validate.rehearsal.truth.shared_layouts import shared_layouts

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run what is not recorded, and report."""
    options = _parse()
    release = torchtitan_identity().name
    line = release.rpartition(".")[0] or release
    path = options.out / f"{'shared-' if options.shared else ''}layouts-{release}.csv"
    recorded = {row.layout: row for row in read_rows(path)} if path.exists() else {}
    if options.again:
        sys.exit(_run_again(line, _quickest(list(recorded.values()), options.again)))
    if options.mended:
        sys.exit(_run_mended(recorded.values()))
    every = shared_layouts(line) if options.shared else layouts(line)
    todo = [layout for layout in every if layout not in recorded and is_of(release, layout)]

    def wanted() -> Iterator[Layout]:
        yield from todo
        # By now it is recorded what these were refused for.
        if not options.shared:
            yield from filter(None, map(repaired, not_repaired(recorded.values())))

    if options.judge:
        verdicts = judge_layouts(recorded)
        for row, verdict in zip(list(recorded.values()), verdicts, strict=True):
            recorded[row.layout] = replace(row, verdict=verdict)
    else:
        for row in run_layouts(tqdm(itertools.islice(wanted(), options.part))):
            recorded[row.layout] = row
            write_rows(path, [(one, explain(line, one)) for one in recorded.values()])
    explained = [(one, explain(line, one)) for one in recorded.values()]
    write_rows(path, explained)
    for kind, count in zip(KINDS, count_kinds(line, recorded.values()), strict=True):
        print(f"{count:5} {kind}")
    left = [row for row, why in explained if why == UNEXPLAINED]
    for row in left:
        print(f"{row.layout}: {row.verdict}; {row.outcome} {row.worst} {row.wrong} {row.stage} {row.error}")
    sys.exit(1 if left else 0)


def _quickest(rows: list[Row], count: int) -> list[Row]:
    """Return so many of each outcome, of those that split something."""
    rows = sorted((row for row in rows if row.layout.degrees["tp"] > 1), key=lambda row: float(row.seconds))
    outcomes = dict.fromkeys(row.outcome for row in rows)
    return [row for outcome in outcomes for row in [r for r in rows if r.outcome == outcome][:count]]


def _run_mended(rows: Iterable[Row]) -> int:
    """Run again what was refused for faults alone; return how many do not fit and equal one process now."""
    layouts = [stock(row.layout) for row in not_repaired(row for row in rows if not row.layout.repaired)]
    changed = 0
    for row in tqdm(run_layouts(layouts), total=len(layouts)):
        if (row.verdict, row.outcome) != ("fits", "equal"):
            changed += 1
            print(f"{row.layout}: {row.verdict}; {row.outcome} {row.worst} {row.wrong} {row.error}")
    print(f"{len(layouts) - changed} of {len(layouts)} layouts fit and are equal")
    return changed


def _run_again(line: str, rows: list[Row]) -> int:
    """Run recorded layouts again; return how many come out in another way."""
    changed = 0
    hanging = [row.layout for row in rows if row.outcome == "hangs"]
    for row, again in zip(rows, run_layouts([row.layout for row in rows], hanging), strict=True):
        same = (row.verdict, row.outcome, explain(line, row)) == (
            *(again.verdict, again.outcome),
            explain(line, again),
        )
        changed += not same
        print(f"{'as recorded' if same else 'CHANGED'}: {row.layout}: {again.outcome} {again.wrong}")
    return changed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, metavar="N", help="run the first N that are not recorded")
    parser.add_argument("--shared", action="store_true", help="those with shared key-value heads")
    parser.add_argument("--judge", action="store_true", help="run nothing")
    parser.add_argument("--again", type=int, metavar="N", help="run N of each outcome again")
    parser.add_argument("--mended", action="store_true", help="run again what faults are refused for")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "truth", help="folder of the table")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
