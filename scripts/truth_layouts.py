#!/usr/bin/env python
"""The truth of layouts: what our verdict says of each, and what torchtitan's own Trainer makes of it.

    scripts/truth_layouts.py            every layout of the installed torchtitan that is not recorded yet
    scripts/truth_layouts.py --part 20  the first 20 of these
    scripts/truth_layouts.py --explain  run nothing: explain again what is recorded

Each is a rehearsal of a small model on the CPU, over gloo. They are recorded one by one in
OUT/layouts-VERSION.csv. The exit status is 0 when all that is recorded is explained.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from torchtitan_tp_validate.rehearsal.truth.explained import UNEXPLAINED, explain
from torchtitan_tp_validate.rehearsal.truth.layout_runs import run_layouts
from torchtitan_tp_validate.rehearsal.truth.layouts import layouts, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run what is not recorded, and report."""
    options = _parse()
    release = version("torchtitan")
    line = ".".join(release.split(".")[:2])
    path = options.out / f"layouts-{release}.csv"
    recorded = {row.layout: row for row in read_rows(path)} if path.exists() else {}
    todo = [layout for layout in layouts(line) if layout not in recorded]
    todo = [] if options.explain else todo[: options.part]
    for row in tqdm(run_layouts(todo), total=len(todo), disable=not todo):
        recorded[row.layout] = row
        write_rows(path, [(one, explain(line, one)) for one in recorded.values()])
    explained = [(one, explain(line, one)) for one in recorded.values()]
    write_rows(path, explained)
    for why, count in Counter(why.partition(":")[0] for _, why in explained).most_common():
        print(f"{count:5} {why}")
    left = [row for row, why in explained if why == UNEXPLAINED]
    for row in left:
        print(f"{row.layout}: {row.verdict}; {row.outcome} {row.worst} {row.wrong} {row.stage} {row.error}")
    sys.exit(1 if left else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, metavar="N", help="run the first N that are not recorded")
    parser.add_argument("--explain", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "truth", help="folder of the table")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
