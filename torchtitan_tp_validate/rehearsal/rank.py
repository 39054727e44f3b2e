"""One rank: build, parallelize and train tiny models, and compare them with one process.

    torchrun --nproc-per-node 2 -m torchtitan_tp_validate.rehearsal.rank --cases CASES.json --out DIR

Cases run one after the other in one process group, which an exception does not disturb that comes on all
ranks alike. Ranks tell each other how a case ended through torchrun's store and never by a collective, which
a rank that raised would leave the others in. ``DIR/rank{RANK}.jsonl`` gets a line as soon as a case has ended
on the rank, and a second one, marked final, when it has on all. When the ranks are not in step any more after
an exception, or one of them does not end a case in time, they go on in new forks.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import torchtitan_tp_validate
from torchtitan_tp_validate.rehearsal import models
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.checkpoints import move_checkpoints
from torchtitan_tp_validate.rehearsal.forks import OUT_OF_STEP, run_in_forks
from torchtitan_tp_validate.rehearsal.models import TinyModel
from torchtitan_tp_validate.rehearsal.parallelize import (
    Guards,
    build,
    judge,
    make_parallel_dims,
    parallelize,
)
from torchtitan_tp_validate.rehearsal.pipeline import Pipeline
from torchtitan_tp_validate.rehearsal.reports import (
    DIFFERENT,
    EQUAL,
    EXCEPTION,
    INVALID,
    REFUSED,
    UNSTABLE,
    Report,
    append_report,
)
from torchtitan_tp_validate.rehearsal.training import (
    BATCH_SIZE,
    MAX_NORM,
    Difference,
    Gradients,
    Step,
    choose_device,
    collectives,
    copy_weights,
    load_weights,
    named_parameters,
    open_process_group,
    relative_difference,
    train,
    unfused,
)

TOLERANCE = 1e-4
"""Relative. Sums in another order differ by about 1e-6 in fp32."""

PATIENCE = timedelta(seconds=20)
"""For the other ranks to end a case that this one has ended; in step, they are milliseconds apart."""

GIVEN_UP = "given up"
"""The key by which a rank tells those that it does not wait for any more."""

CASES_PER_COLLECTION = 8
"""A model is part of circles. To find them takes a third of a second, as long as a case does."""


class _OutOfStepError(Exception):
    """Another rank did not end the case in time."""


def main() -> None:
    """Run all cases of the command line, repaired of what the installed torchtitan trains wrong."""
    from torchtitan_tp_validate import repairs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = [Case(**data) for data in json.loads(options.cases.read_text(encoding="utf-8"))]
    line = models.installed_line()
    device = choose_device()
    line.prepare(device.type)
    repairs.apply_all()

    def run(cases: Sequence[Case], attempt: int) -> NoReturn:
        open_process_group(device, attempt)
        rank = Rank(line, device, options.out)
        # Nothing less than os._exit ends a process that has a collective under way.
        try:
            for number, case in enumerate(cases):
                if not rank.run(case, str(number)):
                    break
                if number % CASES_PER_COLLECTION == 0:
                    gc.collect()
        except _OutOfStepError:
            os._exit(OUT_OF_STEP)
        os._exit(0)

    run_in_forks(cases, options.out, run)


@dataclass(frozen=True)
class _Ends:
    """How all ranks ended a case, and whether each of them has entered the same collectives."""

    truths: set[str]
    in_step: bool


@dataclass(frozen=True)
class Reference:
    """What one process trains from which weights, its QKV projections taken apart."""

    weights: Gradients
    steps: list[Step]


class Rank:
    """This process, and what its cases share: a line, a device, meshes and references."""

    def __init__(self, line: ModuleType, device: torch.device, out: Path) -> None:
        self.line = line
        self.device = device
        self.out = out
        self.store = dist.PrefixStore("cases", dist.distributed_c10d._get_default_store())
        self.guards = Guards()
        self._parallel_dims: dict[tuple[Any, ...], Any] = {}
        self._references: dict[str, Reference] = {}  # The last one.

    def run(self, case: Case, number: str) -> bool:
        """Run a case to the agreement of all ranks; return whether they are still in step then."""
        report = self._attempt(case)
        if self.store.check([GIVEN_UP]):
            # What was raised here came of another rank's end, not of the case.
            raise _OutOfStepError(case.key)
        append_report(asdict(report), self.out)
        ends = self._exchange(f"{number}/first", report)
        if DIFFERENT in ends.truths and EXCEPTION not in ends.truths:
            # Rounding can send a token to another expert. That does not happen twice.
            again = self._attempt(replace(case, seed=case.seed + 1000))
            ends = self._exchange(f"{number}/second", again)
            if again.truth != report.truth:
                report.truth = UNSTABLE
            report.seconds += again.seconds
        report.final = True
        append_report(asdict(report), self.out)
        return ends.in_step

    def _attempt(self, case: Case) -> Report:
        started = time.monotonic()
        report = Report(key=case.key, rank=dist.get_rank())
        with _described(report):
            if case.checkpoints:
                report.checkpoints = move_checkpoints(
                    case, self.line, self.device, self.guards, self.out / case.family
                )
                report.truth = EQUAL
            else:
                self._compare(case, report)
        report.seconds = time.monotonic() - started
        return report

    def _compare(self, case: Case, report: Report) -> None:

        def enter(stage: str) -> None:
            report.stage = stage

        reference = self._reference(case.in_one_process, lambda stage: enter(f"reference {stage}"))
        report.reference_losses = [step.loss for step in reference.steps]
        report.reference_norms = [step.norm for step in reference.steps]

        enter("build")
        self.guards.before_build(case)
        tiny = build(self.line, case)
        self.guards.after_build(case)
        parallel_dims = self._dims(tiny, case)
        if case.guard == "none":
            report.verdict = judge(tiny, parallel_dims, case)
            if case.replicate_kv_heads:
                self.line.replicate_kv_heads(tiny.model, case.tp)
        enter("parallelize")
        with _touched(tiny, report):
            model, context, pipeline = parallelize(tiny, parallel_dims, case, self.device)
        enter("initialize")
        tiny.initialize(model, self.device)
        names = dict(named_parameters(model))
        weights = {n: w for n, w in reference.weights.items() if pipeline is None or n in names}
        load_weights(model, weights)
        report.rows_of_wk = _rows_of_wk(model)
        before = sum(collectives())
        steps = train(
            *(tiny, model, self.device),
            **_how(case, enter),
            rows=_rows(case),
            context=context,
            pipeline=pipeline,
            clip=partial(_clip, case, pipeline) if case.as_trainer else None,
        )
        _report_difference(steps, case, model, reference, report, pipeline)
        report.collectives_in_training = sum(collectives()) - before

    def _reference(self, case: Case, enter: Callable[[str], None]) -> Reference:
        """Return the run in one process, which is kept for the case that follows."""
        if case.key not in self._references:
            enter("build")
            tiny = build(self.line, case)
            torch.manual_seed(case.seed)
            tiny.initialize(tiny.model, self.device)
            weights = _by_projection(case, tiny.model, copy_weights(tiny.model))
            clip = partial(_clip, case, None) if case.as_trainer else None
            steps = [
                replace(step, gradients=_by_projection(case, tiny.model, step.gradients))
                for step in train(tiny, tiny.model, self.device, **_how(case, enter), clip=clip)
            ]
            if not all(math.isfinite(step.loss) for step in steps):
                raise ArithmeticError("the loss of TP = 1 is not finite")
            self._references = {case.key: Reference(weights, steps)}
        return self._references[case.key]

    def _dims(self, tiny: TinyModel, case: Case) -> Any:
        """Return torchtitan's ParallelDims: one for all unguarded cases of the same degrees.

        Each of its own would open new process groups. A guarded case has one that has opened none yet.
        """
        if case.guard != "none":
            return make_parallel_dims(tiny, case)
        if case.meshes not in self._parallel_dims:
            self._parallel_dims[case.meshes] = make_parallel_dims(tiny, case)
        return self._parallel_dims[case.meshes]

    def _exchange(self, name: str, report: Report) -> _Ends:
        """Tell the others how this rank ended, and hear how they did.

        Raises:
            _OutOfStepError: one of them has not ended after `PATIENCE`.
        """
        mine = {"truth": report.truth, "collectives": collectives()}
        keys = [f"{name}/{rank}" for rank in range(dist.get_world_size())]
        self.store.set(keys[dist.get_rank()], json.dumps(mine))
        try:
            self.store.wait(keys, PATIENCE)
        except RuntimeError:
            self.store.set(GIVEN_UP, name)
            raise _OutOfStepError(name) from None
        ends = [json.loads(self.store.get(key)) for key in keys]
        return _Ends(
            truths={end["truth"] for end in ends},
            in_step=all(end["collectives"] == mine["collectives"] for end in ends),
        )


@contextmanager
def _touched(tiny: TinyModel, report: Report) -> Iterator[None]:
    """Report what has been touched until the block ends or raises."""
    groups, entered = dist.distributed_c10d._world.pg_map, sum(collectives())
    opened = len(groups)
    try:
        yield
    finally:
        report.touched = (sum(collectives()) - entered, len(groups) - opened)
        report.sharded_parameters = sum(isinstance(p, DTensor) for p in tiny.model.parameters())


def _how(case: Case, enter: Callable[[str], None]) -> dict[str, Any]:
    """Return the arguments of `train` that are the same on one rank and on many."""
    return {"steps": 3 if case.as_trainer else 2, "seed": case.seed, "enter": enter}


def _rows(case: Case) -> slice:
    """Return the rows of a batch that are this rank's."""
    # On CPU the gated-delta layers of Qwen3.5 read a batch as one stream: every rank has all of it.
    ranks = case.dp * case.dp_replicate if case.as_trainer and not case.family.startswith("qwen3_5") else 1
    mine = dist.get_rank() // case.tp % ranks
    return slice(mine * BATCH_SIZE // ranks, (mine + 1) * BATCH_SIZE // ranks)


def _clip(case: Case, pipeline: Pipeline | None, parameters: list[nn.Parameter]) -> torch.Tensor:
    from torchtitan.distributed.utils import clip_grad_norm_

    pp_mesh = pipeline.parallel_dims.get_mesh("pp") if pipeline else None
    norm: torch.Tensor = clip_grad_norm_(
        parameters, MAX_NORM, foreach=False, pp_mesh=pp_mesh, ep_enabled=case.ep > 1
    )
    return norm


def _by_projection(case: Case, model: nn.Module, tensors: Gradients) -> Gradients:
    """Return weights or gradients as they can be compared: with shared heads no QKV projection is fused."""
    return unfused(model, tensors) if case.as_trainer else tensors


def _rows_of_wk(model: nn.Module) -> list[int]:
    return [
        parameter.to_local().shape[0] if isinstance(parameter, DTensor) else parameter.shape[0]
        for name, parameter in named_parameters(model)
        if name.startswith("layers.") and name.endswith(("wk.weight", "wv.weight"))
    ]


def _report_difference(
    seen: Iterator[Step],
    case: Case,
    model: nn.Module,
    reference: Reference,
    report: Report,
    pipeline: Pipeline | None,
) -> None:
    difference = Difference()
    report.loss_difference = 0.0
    for step, wanted in zip(seen, reference.steps, strict=True):
        report.losses.append(_mean_over_ranks(step.loss) if case.as_trainer else step.loss)
        report.norms.append(step.norm)
        loss = relative_difference(report.losses[-1] - wanted.loss, wanted.loss)
        report.loss_difference = max(report.loss_difference, loss)
        gradients = _by_projection(case, model, step.gradients)
        # A pipeline stage has its own parameters only.
        whole = pipeline is None
        difference.add(gradients, wanted.gradients if whole else {n: wanted.gradients[n] for n in gradients})
        report.gradient_difference = difference.relative
        report.worst_gradient = difference.worst
        report.compared_gradients = difference.compared
    report.stage = "done"
    report.message = difference.reshaped
    worst = max(report.loss_difference, difference.relative)
    report.truth = EQUAL if worst <= TOLERANCE and difference.reshaped is None else DIFFERENT


def _mean_over_ranks(value: float) -> float:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return float(total.item() / dist.get_world_size())


@contextmanager
def _described(report: Report) -> Iterator[None]:
    """Turn what is raised into a line of the report."""
    try:
        yield
    except torchtitan_tp_validate.TPValidateError as error:
        report.truth = REFUSED
        _describe(error, report)
        if isinstance(error, torchtitan_tp_validate.TPCompatError):
            report.refusal = {"valid_degrees": error.valid_degrees, "tp": error.tp, "model": error.model}
    except Exception as error:
        report.truth = INVALID if report.stage.startswith("reference") else EXCEPTION
        _describe(error, report)
        traceback.print_exc()


def _describe(error: Exception, report: Report) -> None:
    report.error_type = type(error).__name__
    report.message = str(error)


if __name__ == "__main__":
    main()
