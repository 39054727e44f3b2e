"""Set up random runs by torchtitan's Trainer, and compare with the verdicts: ``tests/truth/set-ups-*.csv``.

Goes on where it was stopped. Exits with 1 when a run is missed or falsely refused.

    python scripts/truth_set_ups.py [--number 600]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from torchtitan_tp_validate.rehearsal.jobs import installed_line
from torchtitan_tp_validate.rehearsal.truth.set_ups import Runner, draw, read, write

TABLES = Path(__file__).parent.parent / "tests" / "truth"


def main() -> int:
    """Run what is not recorded yet; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--number", type=int, default=600, help="how many runs there are to be")
    parser.add_argument("--table", type=Path, help="where they are recorded")
    options = parser.parse_args()
    release = version("torchtitan").partition("+")[0]
    table = options.table or TABLES / f"set-ups-{release}.csv"
    recorded = {row.run: row for row in read(table)} if table.exists() else {}
    drawn = draw(release[:3], options.number)
    runner = Runner(installed_line())
    for one in drawn:
        if one.run not in recorded:
            row = recorded[one.run] = runner.run(one)
            if row.is_missed or row.is_falsely_refused:
                print(row, flush=True)
            if len(recorded) % 20 == 0:
                print(len(recorded), flush=True)
                write(table, (recorded[other.run] for other in drawn if other.run in recorded))
    rows = [recorded[one.run] for one in drawn]
    write(table, rows)
    found = Counter(
        "missed" if row.is_missed else "falsely refused" if row.is_falsely_refused else "agrees"
        for row in rows
    )
    print(dict(found))
    return 1 if found["missed"] or found["falsely refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
