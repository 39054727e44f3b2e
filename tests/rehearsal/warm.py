"""Rehearse many jobs in forks of one process, since importing torchtitan takes longer than a rehearsal.

    python -m tests.rehearsal.warm OUT

Every folder of ``OUT`` with a ``request.json`` becomes the folder of a rehearsal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.forked import run_program
from torchtitan_tp_validate.rehearsal.children import run_in_fork
from torchtitan_tp_validate.rehearsal.findings import Rehearsal
from torchtitan_tp_validate.rehearsal.jobs import installed_line
from torchtitan_tp_validate.rehearsal.program import write_result
from torchtitan_tp_validate.rehearsal.rehearse import read_result

DEFAULTS = {
    **{"arguments": [], "model": "", "flavor": "", "degrees": (), "replicate_kv_heads": False},
    **{"compile": False, "repair": False, "ranks": 2, "patience": 120.0, "keep": False},
}


def rehearse_all(requests: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Rehearse all of them, as by the arguments of `rehearse`, in folders of theirs."""
    for name, request in requests.items():
        (out / name).mkdir()
        told = {**DEFAULTS, **request}
        told["degrees"] = list(dict(told["degrees"]).items())
        (out / name / "request.json").write_text(json.dumps(told), encoding="utf-8")
    run_program("tests.rehearsal.warm", out)


def found(out: Path, name: str) -> Rehearsal:
    """Return what came of one.

    Raises:
        RehearsalError: it could not be rehearsed.
    """
    return read_result(out / name, 0)


def main(folder: str) -> None:
    """Run everything in a folder."""
    line = installed_line()
    used = line.prepare(compile=False)
    for path in sorted(Path(folder).glob("*/request.json")):
        request = json.loads(path.read_text(encoding="utf-8"))
        run_in_fork(partial(write_result, line, used, path.parent, request), path.with_name("output.txt"))


if __name__ == "__main__":
    main(sys.argv[1])
