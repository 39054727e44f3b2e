"""Rehearse a torchtitan run: its own Trainer with a small model, on ranks of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.findings import Rehearsal, judged
from torchtitan_tp_validate.rehearsal.jobs import Request

RANKS = 4
PATIENCE_SECONDS = 60.0
"""For ranks that make no progress. A stage of a small model takes a second or two."""

_PROGRAM = "torchtitan_tp_validate.rehearsal.program"
_MOST_OUTPUT = 2000


def rehearse(
    arguments: Sequence[str] = (),
    *,
    model: str = "",
    flavor: str = "",
    degrees: Mapping[str, int | str] | None = None,
    replicate_kv_heads: bool = False,
    ranks: int = RANKS,
    patience: float = PATIENCE_SECONDS,
) -> Rehearsal:
    """Rehearse a run on the CPU, in processes of its own, of which none is left behind.

    Args:
        arguments: torchtitan's own command line; or else
        model, flavor: a model that torchtitan registers, or a package of your own, and
        degrees: field of torchtitan's parallelism config -> degree.
        replicate_kv_heads: with KV-head replication, as the launcher has it.
        ranks: the most that there may be; degrees are cut to fit.
        patience: seconds after which ranks that make no progress are taken to hang.

    Raises:
        RehearsalError: the run cannot be rehearsed, and why.
    """
    request = Request(tuple(arguments), model, flavor, tuple((degrees or {}).items()), replicate_kv_heads)
    with tempfile.TemporaryDirectory(prefix="tp-validate-rehearsal-") as folder:
        result = _run(Path(folder), {**asdict(request), "ranks": ranks, "patience": patience})
    return judged(result)


def _run(out: Path, request: Mapping[str, Any]) -> Any:
    """Run the program to its end, and return its result."""
    (out / "request.json").write_text(json.dumps(request), encoding="utf-8")
    log = out / "output.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            # It takes its ranks along, whatever it was doing.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace").strip()[-_MOST_OUTPUT:]
    path = out / "result.json"
    if not path.exists():
        raise RehearsalError(f"the rehearsal ended with status {process.returncode}:\n{text}")
    result = json.loads(path.read_text(encoding="utf-8"))
    if "problem" in result:
        raise RehearsalError(f"{result['problem']}{f':{chr(10)}{text}' if 'because' in result else '.'}")
    return result
