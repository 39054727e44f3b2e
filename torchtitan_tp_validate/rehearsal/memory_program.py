"""The program of a `memory.StateMeter`: ``python -m torchtitan_tp_validate.rehearsal.memory_program FD DIR``.

It reads a job, and then layout after layout, from standard input, a line of JSON each, and writes to the file
descriptor what the fullest rank of each holds.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.degrees import PIPELINE_FLAG
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.guards import install
from torchtitan_tp_validate.rehearsal.children import Children, die_with_parent
from torchtitan_tp_validate.rehearsal.cpu import join_fake_ranks
from torchtitan_tp_validate.rehearsal.jobs import Request, installed_line, plain_job
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch
from torchtitan_tp_validate.releases import kv_replication_of, line_of

_PATIENCE_SECONDS = 300.0
_COPIES = {"Adam": 2, "AdamW": 2}
"""Optimizer of torch -> how many tensors like a parameter it keeps for each, beside its step."""
_STEP_BYTES = 4


def main(answers: int, folder: str) -> None:
    """Answer until nobody asks."""
    die_with_parent()
    request = json.loads(sys.stdin.readline())
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        line, job, problem = installed_line(), None, ""
        line.prepare(False)
        try:
            job = plain_job(line.parse(Request(tuple(request["arguments"]))))
            if request["replicate_kv_heads"]:
                kv_replication_of(line_of(job)).put_into_job(job)
                install(replicate_kv_heads=True)
            line.make_plain(job)
        except (Exception, SystemExit) as error:  # whatever it is, whoever asks is to know
            problem = f"{type(error).__name__}: {error}"
        for text in sys.stdin:
            answer: dict[str, Any] = {"problem": problem}
            if not problem:
                try:
                    asked = json.loads(text)
                    answer = _measured(line, job, asked, Path(folder)) if asked else _whole(line, job)
                except Exception as error:  # the same
                    answer = {"problem": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=out, flush=True)


def _whole(line: ModuleType, job: Any) -> dict[str, Any]:
    """Return what all ranks that share one copy of the model hold together."""
    import torch

    size = getattr(torch, job.training.dtype).itemsize
    counts = {one: one.numel() * size for one in line.build_on_meta(job).parameters()}
    trained = sum(count for one, count in counts.items() if one.requires_grad)
    copies = max(_COPIES.values())
    return {"parameters": sum(counts.values()), "gradients": trained, "optimizer": copies * trained}


def _measured(line: ModuleType, job: Any, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the fullest rank holds: the first of a stage, since smaller shards are the last."""
    job, world_size = copy.deepcopy(job), asked["world_size"]
    for field, degree in asked["degrees"].items():
        setattr(job.parallelism, field, degree)
    pp = getattr(job.parallelism, PIPELINE_FLAG)
    children, held = Children(folder, _PATIENCE_SECONDS), []
    for stage in range(pp):
        rank = stage * (world_size // pp)
        (end,) = children.run("layout", 1, partial(_lay_out, line, job, rank, world_size, folder))
        if end.how != "ended":
            return {"problem": f"{end.how}: {end.error}"}
        held.append(json.loads((folder / "layout-rank0.json").read_text(encoding="utf-8")))
    return max(held, key=lambda one: sum(one.values()))


def _lay_out(
    line: ModuleType, job: Any, rank: int, world_size: int, folder: Path, _: int, enter: Any
) -> None:
    """Write what one rank holds."""
    import torch

    join_fake_ranks(job, rank, world_size)
    torch.nn.Module.to_empty = _stay_on_meta
    enter("laying out")
    batch = read_batch(job)
    trainer = line.build_trainer(
        job,
        lambda *_: iter(()),
        batch.local,
        batch.microbatch,
        global_batch_size=batch.total,
    )
    held = _held(trainer.model_parts, list(trainer.optimizers))
    (folder / "layout-rank0.json").write_text(json.dumps(held), encoding="utf-8")


def _stay_on_meta(module: Any, **_: Any) -> Any:
    """Stand in for ``to_empty``, which would take the memory of the weights, and for what fills them."""
    module.init_weights = module.init_states = lambda **_: None
    return module


def _held(parts: list[Any], optimizers: list[Any]) -> dict[str, int]:
    parameters = {id(one): one for part in parts for one in part.parameters()}
    trained = {key: one for key, one in parameters.items() if one.requires_grad}
    state = 0
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if name not in _COPIES:
            raise RehearsalError(f"the state of {name} is not known")
        for group in optimizer.param_groups:
            state += sum(_COPIES[name] * _bytes(one) + _STEP_BYTES for one in group["params"])
    return {
        "parameters": sum(map(_bytes, parameters.values())),
        "gradients": sum(map(_bytes, trained.values())),
        "optimizer": state,
    }


def _bytes(parameter: Any) -> int:
    """Return the bytes of this rank's shard of a parameter."""
    from torch.distributed.tensor import DTensor

    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    count: int = local.numel() * local.element_size()
    return count


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
