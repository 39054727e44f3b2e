"""The program of a rehearsal: ``python -m torchtitan_tp_validate.rehearsal.program DIR``.

It reads ``DIR/request.json``, runs the small job in one process and on all ranks, each in a fork of this
process, and writes ``DIR/result.json``.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.degrees import degrees_of_job
from torchtitan_tp_validate.errors import RehearsalError, TPValidateError
from torchtitan_tp_validate.guards import install
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.job import Options, judge_job, read_job
from torchtitan_tp_validate.rehearsal.children import Children, die_with_parent
from torchtitan_tp_validate.rehearsal.jobs import (
    Request,
    checkpoint_of,
    installed_line,
    pp,
    split,
    validation_of,
)
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch
from torchtitan_tp_validate.rehearsal.small_run import SmallRun
from torchtitan_tp_validate.rehearsal.world import cut_world
from torchtitan_tp_validate.releases import kv_replication_of, line_of
from torchtitan_tp_validate.wrappers.guard import guardable_functions

MICROBATCHES = ((2, 1), (1, 2))
"""Sequences at a time, and how many such batches a step sums the gradients of: as many in all, so that they
have one reference. Upstream has faults that only one sequence at a time shows, and some that only two do."""
ALONE = ((1, 1), (1, 2))
"""The same of a pipeline whose microbatches have one sequence: two are not the run's."""


class _StoppedError(BaseException):
    """The process that started this one has ended, or wants it to."""


def _stop(*_: Any) -> None:
    raise _StoppedError


def main(folder: str) -> None:
    """Run the rehearsal of a folder."""
    out = Path(folder)
    signal.signal(signal.SIGTERM, _stop)
    die_with_parent(signal.SIGTERM)
    request = json.loads((out / "request.json").read_text(encoding="utf-8"))
    try:
        line = installed_line()
        write_result(line, line.prepare(request["compile"]), out, request)
    except _StoppedError:
        # Whoever wanted the result is gone.
        if not request["keep"]:
            shutil.rmtree(out, ignore_errors=True)
        os._exit(1)


def write_result(line: ModuleType, used: set[str], out: Path, request: dict[str, Any]) -> None:
    """Run a rehearsal, and write ``result.json`` into its folder.

    Args:
        line: the module of `jobs` for the torchtitan that is installed.
        used: what its ``prepare`` has returned.
        out: the folder.
        request: the fields of a `Request`, and ``ranks``, ``patience`` and ``keep``.
    """
    options = {name: request[name] for name in ("ranks", "patience", "keep")}
    fields = {name: value for name, value in request.items() if name not in options}
    try:
        result = _rehearse(line, used, Request(**fields), out, **options)
    except TPValidateError as error:
        result = {"problem": str(error), "output": getattr(error, "output", "")}
    except SystemExit:
        # Its parser has said why.
        result = {"problem": "torchtitan does not take the job", "output": None}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _rehearse(
    line: ModuleType, used: set[str], request: Request, out: Path, *, ranks: int, patience: float, keep: bool
) -> dict[str, Any]:
    try:
        job = line.parse(request)
    except Exception as error:  # torchtitan's own complaints have many types, Exception among them
        raise RehearsalError(f"torchtitan does not take the job: {_first_line(error)}") from error
    degrees = degrees_of_job(job)
    requested = read_job(job)
    if requested is None:
        raise RehearsalError("the job names no model")
    repairs: tuple[str, ...] = ()
    if request.repair:
        from torchtitan_tp_validate.repairs import REPAIRS

        found = line_of(job).read_run(job, requested.model, requested.degrees, ())
        repairs = tuple(sorted(found.faults & REPAIRS.keys()))
    world = cut_world(degrees, pp(job), read_batch(job).microbatches, ranks)
    verdict = _verdict(job, request)
    microbatches = ALONE if pp(job) > 1 and read_batch(job).microbatch == 1 else MICROBATCHES
    split(job, world)
    checkpoint, validates = checkpoint_of(job), validation_of(job).enable
    left_out = line.make_small(job, world.degrees, out)
    result: dict[str, Any] = {
        "release": torchtitan_identity().name,
        "model": requested.model.name,
        "verdict": verdict,
        "degrees": {**asdict(world.degrees), "pp": world.pp},
        "cuts": world.cuts,
        "left_out": [*left_out, *(f"{code} repaired" for code in repairs)],
        "microbatches": world.microbatches,
        "runs": [],
    }
    references: dict[int, Path] = {}
    if not request.compile:
        job.compile.enable = False
    if request.replicate_kv_heads:
        kv_replication_of(line_of(job)).put_into_job(job)
        install(replicate_kv_heads=True, repair=request.repair)
    for microbatch_size, accumulates in microbatches:
        folder = out / f"microbatch-{microbatch_size}{'-accumulated' if accumulates > 1 else ''}"
        folder.mkdir(exist_ok=True)
        children = Children(folder, patience)
        run = SmallRun(
            *(line, job, world, microbatch_size, folder, used, keep),
            repairs=repairs,
            accumulates=accumulates,
            checkpoint=checkpoint,
            validates=validates,
        )
        rows = microbatch_size * accumulates
        if rows in references:
            run.take_reference(references[rows])
        else:
            run.run_reference(children)
            references[rows] = folder
        for run_on_ranks in (run.run_ranks, *([run.resume_ranks] if checkpoint is not None else [])):
            result["runs"].append(run_on_ranks(children))
            if any(end["how"] != "ended" for end in result["runs"][-1]["ends"]):
                return result
        # Once is enough of both; and where gradients accumulate, validation has other batches.
        checkpoint, validates = None, False
    return result


def _verdict(job: Any, request: Request) -> str:
    """Return what the rules say of the job as it is."""
    options = Options(replicate_kv_heads=request.replicate_kv_heads, repair=request.repair)
    try:
        verdict = judge_job(copy.deepcopy(job), guarded=guardable_functions(), options=options)
    except TPValidateError as error:
        return str(error)
    assert verdict is not None
    return str(verdict.error or verdict.unread or "fits")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].removesuffix(".") or type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1])
