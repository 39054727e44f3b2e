"""Rehearse a torchtitan run: its own Trainer with a small model, on ranks of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.children import current_stage
from torchtitan_tp_validate.rehearsal.findings import Rehearsal, judged
from torchtitan_tp_validate.rehearsal.jobs import Request
from torchtitan_tp_validate.rehearsal.told import whole_text

RANKS = 4
PATIENCE_SECONDS = 60.0
"""For ranks that make no progress. A stage of a small model takes a second or two."""
COMPILING_PATIENCE_SECONDS = 600.0
"""For those that compile, all in one stage: on two cores that had other work it took longer than a minute."""

_PROGRAM = "torchtitan_tp_validate.rehearsal.program"
_MOST_OUTPUT = 2000
_LOOK_SECONDS = 0.05
_REPEAT = """\
# Repeats the rehearsal whose tensors are beside this file.
from torchtitan_tp_validate.rehearsal.rehearse import rehearse
from torchtitan_tp_validate.rehearsal.told import whole_text

print(whole_text(rehearse({arguments!r}, **{how!r})))
"""


def rehearse(
    arguments: Sequence[str] = (),
    *,
    model: str = "",
    flavor: str = "",
    degrees: Mapping[str, int | str] | None = None,
    replicate_kv_heads: bool = False,
    compile: bool = False,
    repair: bool = False,
    ranks: int = RANKS,
    patience: float | None = None,
    keep: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Rehearsal:
    """Rehearse a run on the CPU, in processes of its own, of which none is left behind.

    Args:
        arguments: torchtitan's own command line; or else
        model, flavor: a model that torchtitan registers, or a package of your own, and
        degrees: field of torchtitan's parallelism config -> degree.
        replicate_kv_heads: with KV-head replication, as the launcher has it.
        compile: what the job compiles. Otherwise nothing is: compiling takes longer than a rehearsal.
        repair: with the repairs of the known faults that its model has in the installed torchtitan.
        ranks: the most that there may be; degrees are cut to fit.
        patience: seconds after which ranks that make no progress are taken to hang; by default 60, and 600
            where they compile.
        keep: a new or empty folder for weights, gradients, the output of every rank, and ``repeat.py``.
        progress: is told what goes on, whenever that changes.

    Raises:
        RehearsalError: the run cannot be rehearsed, and why.
    """
    request = Request(
        tuple(arguments), model, flavor, tuple((degrees or {}).items()), replicate_kv_heads, compile, repair
    )
    if patience is None:
        patience = COMPILING_PATIENCE_SECONDS if compile else PATIENCE_SECONDS
    options: dict[str, Any] = {"ranks": ranks, "patience": patience}
    with _folder(keep) as out:
        if keep is not None:
            how = {**asdict(request), "degrees": dict(request.degrees), **options}
            repeat = _REPEAT.format(arguments=how.pop("arguments"), how=how)
            (out / "repeat.py").write_text(repeat, encoding="utf-8")
        options["keep"] = keep is not None
        status = _run(out, {**asdict(request), **options}, progress or (lambda _: None))
        return read_result(out, status)


def read_result(out: Path, status: int) -> Rehearsal:
    """Return what a rehearsal found, of the folder that it was run in, by a program that ended so.

    Raises:
        RehearsalError: it could not be run.
    """
    text = (out / "output.txt").read_text(encoding="utf-8", errors="replace").strip()[-_MOST_OUTPUT:]
    path = out / "result.json"
    if not path.exists():
        raise RehearsalError(f"the rehearsal ended with status {status}", text)
    result = json.loads(path.read_text(encoding="utf-8"))
    if "problem" in result:
        raise RehearsalError(result["problem"], text if result["output"] is None else result["output"])
    return judged(result)


def assert_equal_to_one_process(*arguments: Any, **how: Any) -> Rehearsal:
    """Assert, in a test of your own, that a rehearsal is equal; see `rehearse`.

    Raises:
        AssertionError: it is not, and how.
    """
    rehearsal = rehearse(*arguments, **how)
    if rehearsal.outcome != "equal":
        raise AssertionError(whole_text(rehearsal))
    return rehearsal


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="tp-validate-rehearsal-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise RehearsalError(f"{keep} is not empty: what is in it is not overwritten")
    except OSError as error:
        raise RehearsalError(f"{keep} cannot hold what is kept: {error.strerror}") from error
    yield keep.resolve()


def _run(out: Path, request: Mapping[str, Any], progress: Callable[[str], None]) -> int:
    """Run the program to its end, and return its exit status."""
    (out / "request.json").write_text(json.dumps(request), encoding="utf-8")
    with (out / "output.txt").open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, str(out)],
            # torch makes its cache as it is imported, and leaves it.
            env={"TORCHINDUCTOR_CACHE_DIR": str(out / "compiled"), **os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, out, progress)
        finally:
            # It takes its ranks along, whatever it was doing.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode


def _wait(process: subprocess.Popen[bytes], out: Path, progress: Callable[[str], None]) -> None:
    said = ""
    while process.poll() is None:
        now = current_stage(out)
        if now != said:
            progress(now)
            said = now
        time.sleep(_LOOK_SECONDS)
