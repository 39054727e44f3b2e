"""Train jobs of full size for some steps on real ranks, and tell what each rank then holds, and has sent.

    python -m tests.rehearsal.held OUT

``OUT/jobs.json`` lists the arguments of each and its number of ranks; ``OUT/held.json`` gets, for each, the
bytes of the fullest rank, with those that the first one of every stage sends in a step, and that a rank takes
at most, or why it did not train.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchtitan_tp_validate.rehearsal.children import Children, die_with_parent
from torchtitan_tp_validate.rehearsal.jobs import Request, installed_line, plain_job, pp
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch


def main(folder: str) -> None:
    """Run the jobs of a folder."""
    die_with_parent()
    out, line = Path(folder), installed_line()
    line.prepare(False)
    held = [_train(line, *one, out) for one in json.loads((out / "jobs.json").read_text(encoding="utf-8"))]
    (out / "held.json").write_text(json.dumps(held), encoding="utf-8")


def _train(line: ModuleType, arguments: list[str], ranks: int, out: Path) -> Any:
    job = plain_job(line.parse(Request(tuple(arguments))))
    for end in Children(out, 300.0).run("held", ranks, partial(_rank, line, job, out)):
        if end.how != "ended":
            return f"rank {end.rank} {end.how}: {end.stage}: {end.error} {end.traceback}"
    found = [json.loads((out / f"held-rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    each = ranks // pp(job)
    firsts = range(0, ranks, each)
    # What gloo's threads hold for a while longer, in some steps on some ranks, comes on top.
    peaks = [min(one["peak"] for one in found[first : first + each]) for first in firsts]
    return {
        **max(found, key=lambda one: one["parameters"]),
        "sent": [{"rank": rank, **one} for rank in firsts for one in found[rank]["sent"]],
        "peak": max(peaks),
    }


def _rank(line: ModuleType, job: Any, out: Path, rank: int, enter: Any) -> None:
    from torchtitan_tp_validate.rehearsal.batches import Batches
    from torchtitan_tp_validate.rehearsal.process import sum_gradients_without_nccl
    from torchtitan_tp_validate.rehearsal.traffic import SentBytes, by_axes, take_step

    enter("building")
    line.make_plain(job)
    _run_experts_in_bfloat16()
    job.training.dtype = job.training.mixed_precision_param = "float32"
    batch = read_batch(job)
    rows = batch.local * 64
    batches = Batches(rows, batch.seq_len, line.vocab_size(job), seed=1, more=line.more_inputs(job))
    trainer = line.build_trainer(job, batches.of_rank, batch.local, batch.microbatch)
    for model in trainer.model_parts:
        sum_gradients_without_nccl(model)
    peaks = []
    for step in range(1, 4):
        enter(f"step {step}")
        with SentBytes() as counter, Allocated() as allocated:
            take_step(trainer)
        peaks.append(allocated.peak)
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    degrees = {name: getattr(trainer.parallel_dims, name) for name in axes}
    parameters = [one for part in trainer.model_parts for one in part.parameters()]
    states = [
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
    ]
    gradients = sum(_bytes(one.grad) for one in parameters if one.grad is not None)
    held = {
        "parameters": sum(map(_bytes, parameters)),
        "gradients": gradients,
        "optimizer": sum(map(_bytes, states)),
        "sent": by_axes(counter.groups, degrees),
        # Those of the step before are freed as one begins.
        "peak": min(peaks[1:]) + gradients,
    }
    (out / f"held-rank{rank}.json").write_text(json.dumps(held), encoding="utf-8")


class Allocated:
    """The most bytes that torch's allocator has given out at once since it was entered."""

    peak = 0

    def __enter__(self) -> Allocated:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        self.peak = max(itertools.accumulate(changes), default=0)


def _run_experts_in_bfloat16() -> None:
    """Run them as torchtitan 0.3.x does: what they send is of that precision."""
    with contextlib.suppress(ImportError):
        from torchtitan.models.common.moe import GroupedExperts

        GroupedExperts.forward = GroupedExperts.forward.__wrapped__


def _bytes(tensor: Any) -> int:
    from torch.distributed.tensor import DTensor

    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


if __name__ == "__main__":
    main(sys.argv[1])
