#!/usr/bin/env python
"""Draw the picture in docs/cli.md: what `tp-validate table` shows in a terminal, as an SVG.

    scripts/matrix.py [FILE]

Needs torchtitan 0.3.x, whose models it shows.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from torchtitan_tp_validate.cli import build_parser
from torchtitan_tp_validate.cli.commands.table import matrix, survey
from torchtitan_tp_validate.cli.output import width_of

PICTURE = Path(__file__).parent / "matrix.svg"


def main() -> None:
    """Draw it into the file that is named, or the one that docs/cli.md shows."""
    options = build_parser("table").parse_args(["table", "--world-size", "32"])
    options.output_file = None
    reports = [report for report in survey(options) if report.plan is not None]
    table = matrix(reports, options.tp, options.world_size)
    console = Console(record=True, file=io.StringIO(), force_terminal=True)
    console.width = width_of(table, console)
    console.print(table)
    target = sys.argv[1] if len(sys.argv) > 1 else str(PICTURE)
    # A fixed id, so that the same table is the same file.
    console.save_svg(target, title="tp-validate table --world-size 32", unique_id="matrix")


if __name__ == "__main__":
    main()
