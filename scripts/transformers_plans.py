#!/usr/bin/env python
"""Write the tensor parallel plans of the installed transformers into the table that the package ships.

    scripts/transformers_plans.py

What the table says of other releases stays: run it once per release, in an environment with that transformers
and torch. Of a release, its last patch release.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan_tp_validate.releases import transformers_plans
from torchtitan_tp_validate.transformers_tp.plan_table import read_installed, with_release


def main() -> None:
    """Replace the installed release's part of the table, or add it."""
    found = read_installed()
    file = transformers_plans.FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    file.write_text(with_release(known, found), encoding="utf-8")
    major, minor = found.release
    print(
        f"transformers {major}.{minor}: {len(found.model_types)} model types, {len(found.classes)} classes "
        f"with a plan of their own; {file.stat().st_size:,} bytes for all releases"
    )


if __name__ == "__main__":
    main()
