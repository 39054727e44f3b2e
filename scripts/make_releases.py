#!/usr/bin/env python
"""Write down what tells each tested torchtitan release: the files that the check's patch for it changes.

    scripts/make_releases.py

They are the files that hold the entry points and what these rely on, and the patch gives their git blobs,
before and after. The table is torchtitan_tp_validate/release_files.py; a test holds it to the patches.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from apply_patches import GUARD, PATCHES, read_changes  # noqa: E402

TABLE = ROOT / "torchtitan_tp_validate" / "release_files.py"
_HEAD = '''"""The files that tell a tested torchtitan release; written by scripts/make_releases.py."""

BLOBS: dict[str, dict[str, tuple[str, str]]] = {
'''
_TAIL = '''}
"""Release -> file -> its git blob as released, and with this project's patch."""
'''


def table() -> str:
    """The source of the table, for the patches as they are."""
    lines = []
    for patch in sorted(PATCHES.glob(f"torchtitan-*/{GUARD}")):
        lines.append(f'    "{patch.parent.name.removeprefix("torchtitan-")}": {{\n')
        for change in read_changes(patch):
            if change.path.startswith("torchtitan/"):
                blobs = f'            "{change.before}",\n            "{change.after}",\n'
                lines.append(f'        "{change.path}": (\n{blobs}        ),\n')
        lines.append("    },\n")
    return f"{_HEAD}{''.join(lines)}{_TAIL}"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
