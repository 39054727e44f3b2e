"""The program of `memory.LayoutMeter`: ``python -m torchtitan_tp_validate.rehearsal.memory_program FD DIR``.

It reads a job, and then layout after layout, from standard input, a line of JSON each, and writes to the file
descriptor what the fullest rank of each holds, or what the first one of every stage sends and takes in a
step.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.guards import install
from torchtitan_tp_validate.rehearsal.children import Children, die_with_parent
from torchtitan_tp_validate.rehearsal.cpu import join_fake_ranks
from torchtitan_tp_validate.rehearsal.jobs import Request, installed_line, plain_job
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch
from torchtitan_tp_validate.rehearsal.stages import exchange_shapes
from torchtitan_tp_validate.releases import kv_replication_of, line_of

_PATIENCE_SECONDS = 300.0
_STEP_PATIENCE_SECONDS = 3600.0
_STEPS = (1, 2)
"""The first one is not as the others: FSDP has yet to see in which order its modules are used."""

_AXES = ("dp_replicate", "dp_shard", "cp", "tp")
"""Of ranks within a stage, from the outermost in their order to the innermost."""

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
            named = Request(tuple(request["arguments"]), request["model"], request["flavor"])
            job = plain_job(line.parse(named))
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
                    measure = _followed if "step" in asked else _measured
                    answer = measure(line, job, asked, Path(folder)) if asked else _whole(line, job)
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
    job, world_size = _in_layout(job, asked), asked["world_size"]
    pp = getattr(job.parallelism, PIPELINE_FLAG)
    children, held = Children(folder, _PATIENCE_SECONDS), list[Any]()
    for stage in range(pp):
        rank = stage * (world_size // pp)
        found = _in_children(children, 1, partial(_lay_out, line, job, rank, world_size, folder), folder)
        if "problem" in found:
            return found
        held += found["ranks"]
    return max(held, key=lambda one: sum(one.values()))


def _followed(line: ModuleType, job: Any, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the first rank of every stage sends in a step, and the memory that it takes."""
    job = _in_layout(job, asked)
    pp = getattr(job.parallelism, PIPELINE_FLAG)
    children = Children(folder, _STEP_PATIENCE_SECONDS)
    return _in_children(children, pp, partial(_follow, line, job, asked, folder), folder)


def _in_layout(job: Any, asked: dict[str, Any]) -> Any:
    job = copy.deepcopy(job)
    for field, degree in asked["degrees"].items():
        setattr(job.parallelism, field, degree)
    return job


def _in_children(
    children: Children, ranks: int, function: Callable[[int, Any], None], folder: Path
) -> dict[str, Any]:
    """Return what each rank writes, or what went wrong."""
    ends = children.run("layout", ranks, function)
    # Who waits for another is not at fault.
    for end in sorted(ends, key=lambda end: end.how == "waited"):
        if end.how != "ended":
            return {"problem": f"{end.how}: {end.error}"}
    texts = ((folder / f"layout-rank{end.rank}.json").read_text(encoding="utf-8") for end in ends)
    return {"ranks": [json.loads(text) for text in texts]}


def _follow(line: ModuleType, job: Any, asked: dict[str, Any], folder: Path, stage: int, enter: Any) -> None:
    """Write what the first rank of a stage sends in its second step, and the memory that it takes."""
    from torchtitan_tp_validate.rehearsal.traffic import WithoutMemory, by_axes

    world_size, pp = asked["world_size"], getattr(job.parallelism, PIPELINE_FLAG)
    rank = stage * (world_size // pp)
    join_fake_ranks(job, rank, world_size)
    exchange_shapes(rank, _STEP_PATIENCE_SECONDS)
    line.follow_shapes()
    enter("laying out")
    memory, batch = WithoutMemory(), read_batch(job)
    memory.patch()
    trainer = _built(
        line,
        job,
        lambda _, __, rows: memory.batches(batch.seq_len, rows, line.more_inputs(job)),
    )
    for step in _STEPS:
        enter(f"step {step}")
        groups, peak = memory.step(trainer)
    degrees = {"pp": pp, **{axis: asked["degrees"][FLAGS[axis]] for axis in _AXES}}
    found = {"rank": rank, "sent": by_axes(groups, degrees), "peak": peak, "kept": _kept(trainer)}
    (folder / f"layout-rank{stage}.json").write_text(json.dumps(found), encoding="utf-8")


def _lay_out(
    line: ModuleType, job: Any, rank: int, world_size: int, folder: Path, _: int, enter: Any
) -> None:
    """Write what one rank holds."""
    import torch

    join_fake_ranks(job, rank, world_size)
    torch.nn.Module.to_empty = _stay_on_meta
    enter("laying out")
    trainer = _built(line, job, lambda *_: iter(()))
    held = _held(trainer.model_parts, list(trainer.optimizers))
    (folder / "layout-rank0.json").write_text(json.dumps(held), encoding="utf-8")


def _built(line: ModuleType, job: Any, feed: Callable[..., Any]) -> Any:
    """Return the job's Trainer, its batches as the job has them."""
    batch = read_batch(job)
    return line.build_trainer(
        job,
        feed,
        batch.local,
        batch.microbatch,
        global_batch_size=batch.total,
    )


def _stay_on_meta(module: Any, **_: Any) -> Any:
    """Stand in for ``to_empty``, which would take the memory of the weights, and for what fills them."""
    module.init_weights = module.init_states = lambda **_: None
    return module


def _kept(trainer: Any) -> int:
    """Return the bytes that a rank has before and after a step: its parameters, its optimizers' state."""
    import torch
    from torch.utils._pytree import tree_leaves

    parameters = [one for part in trainer.model_parts for one in part.parameters()]
    states = [value for one in trainer.optimizers for value in tree_leaves(list(one.state.values()))]
    return sum(map(_bytes, (*parameters, *(one for one in states if isinstance(one, torch.Tensor)))))


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
