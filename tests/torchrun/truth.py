"""One rank of the truth suite: what do our verdict and a real run say about a list of tiny models?

    torchrun --nproc-per-node 2 -m tests.torchrun.truth --cases CASES.json --out DIR

Cases of the same degrees and backend run one after the other in one process group. For each, first our
verdict on the model as built, on meta; then, with our guard not installed and upstream's own checks off,
two training steps at those degrees and on one rank from the same weights.

Ranks tell each other how a case ended through torchrun's store and never by a collective, which a rank
that raised would leave the others in. ``DIR/rank{RANK}.jsonl`` gets a line as soon as a case has ended
on the rank, and a second one, marked final, when it has on all. When the ranks are not in step any more
after an exception, one of them does not end a case in time, or the degrees or the backend change, they
go on in new forks.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import torchtitan_tp_validate
from tests.torchrun import lines, truth_cases
from tests.torchrun.lines import TinyModel
from tests.torchrun.training import (
    Difference,
    Step,
    choose_device,
    collectives,
    copy_weights,
    load_weights,
    open_process_group,
    relative_difference,
    train,
)
from tests.torchrun.truth_cases import Case
from tests.torchrun.truth_forks import (
    DIFFERENT,
    EQUAL,
    EXCEPTION,
    INVALID,
    OUT_OF_STEP,
    UNSTABLE,
    Report,
    Verdict,
    append_report,
    run_in_forks,
)

STEPS = 2
TOLERANCE = 1e-4
"""Relative. Sums in another order differ by about 1e-6 in fp32."""

PATIENCE = timedelta(seconds=15)
"""For the other ranks to end a case that this one has ended; in step, they are milliseconds apart."""


class _OutOfStepError(Exception):
    """Another rank did not end the case in time."""


def main() -> None:
    """Run all cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = [truth_cases.from_dict(data) for data in json.loads(options.cases.read_text(encoding="utf-8"))]
    line = lines.installed_line()
    device = choose_device()
    line.prepare(device.type)

    def run(cases: Sequence[Case], attempt: int) -> NoReturn:
        open_process_group(device, attempt)
        rank = Rank(line, device)
        # Nothing less than os._exit ends a process that has a collective under way.
        try:
            for number, case in enumerate(takewhile(lambda case: case.meshes == cases[0].meshes, cases)):
                if not rank.run(case, str(number), lambda report: append_report(asdict(report), options.out)):
                    break
                gc.collect()
        except _OutOfStepError:
            os._exit(OUT_OF_STEP)
        os._exit(0)

    run_in_forks(cases, options.out, run)


class Rank:
    """This process, and what its cases share: a line, a device and one set of meshes."""

    def __init__(self, line: ModuleType, device: torch.device) -> None:
        self.line = line
        self.device = device
        self.store = dist.PrefixStore("truth", dist.distributed_c10d._get_default_store())
        self._parallel_dims: Any = None

    def run(self, case: Case, number: str, write: Any) -> bool:
        """Run a case to the agreement of all ranks; whether they are still in step then."""
        report = self._attempt(case, case.seed)
        write(report)
        ends = self._exchange(f"{number}/first", report)
        if DIFFERENT in ends.truths and EXCEPTION not in ends.truths:
            # Rounding can send a token to another expert. That does not happen twice.
            again = self._attempt(case, case.seed + 1000)
            ends = self._exchange(f"{number}/second", again)
            if again.truth != report.truth:
                report.truth = UNSTABLE
            report.seconds += again.seconds
        report.final = True
        write(report)
        return ends.in_step

    def _attempt(self, case: Case, seed: int) -> Report:
        started = time.monotonic()
        report = Report(key=case.key, rank=dist.get_rank())
        with _described(report):
            self._compare(case, seed, report)
        report.seconds = time.monotonic() - started
        return report

    def _compare(self, case: Case, seed: int, report: Report) -> None:

        def enter(stage: str) -> None:
            report.stage = stage

        def enter_reference(stage: str) -> None:
            report.stage = f"reference {stage}"

        how: dict[str, Any] = {"steps": STEPS, "seed": seed}
        enter_reference("build")
        reference = build(self.line, case, tp=1)
        torch.manual_seed(seed)
        reference.initialize(reference.model, self.device)
        weights = copy_weights(reference.model)
        expected = list(train(reference, reference.model, self.device, **how, enter=enter_reference))
        if not all(math.isfinite(step.loss) for step in expected):
            raise ArithmeticError("the loss of TP = 1 is not finite")

        enter("build")
        tiny = build(self.line, case, tp=case.tp, ep=case.ep)
        parallel_dims = self._dims(tiny, case.tp)
        report.verdict = judge(tiny, parallel_dims)
        args, kwargs = tiny.arguments(parallel_dims)
        enter("parallelize")
        model = tiny.parallelize_fn(tiny.model, *args, **kwargs)
        enter("initialize")
        tiny.initialize(model, self.device)
        load_weights(model, weights)
        _report_difference(train(tiny, model, self.device, **how, enter=enter), expected, report)

    def _dims(self, tiny: TinyModel, tp: int) -> Any:
        if self._parallel_dims is None:
            # One for all cases: they have the same degree, and each would open new process groups.
            self._parallel_dims = tiny.make_parallel_dims(tp, dist.get_world_size())
        return self._parallel_dims

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
            raise _OutOfStepError(name) from None
        ends = [json.loads(self.store.get(key)) for key in keys]
        return _Ends(
            truths={end["truth"] for end in ends},
            in_step=all(end["collectives"] == mine["collectives"] for end in ends),
        )


@dataclass(frozen=True)
class _Ends:
    """How all ranks ended a case, and whether each of them has entered the same collectives."""

    truths: set[str]
    in_step: bool


def build(line: ModuleType, case: Case, *, tp: int, ep: int = 1) -> TinyModel:
    """The case's model for a run at these degrees, upstream's own head check out of the way."""
    tiny: TinyModel = line.build(
        case.family,
        n_heads=case.n_heads,
        n_kv_heads=case.n_kv_heads,
        tp=tp,
        ep=ep,
        upstream_check=False,
        sizes=case.sizes,
        spmd_backend=case.spmd_backend,
    )
    return tiny


def judge_case(line: ModuleType, case: Case) -> Verdict:
    """What our engine says about a case; nothing is run."""
    tiny = build(line, case, tp=case.tp, ep=case.ep)
    return judge(tiny, tiny.make_parallel_dims(case.tp, case.world_size))


def judge(tiny: TinyModel, parallel_dims: Any) -> Verdict:
    """What our engine says about a model that nothing has parallelized yet."""
    try:
        torchtitan_tp_validate.validate_tp_compat(tiny.model, parallel_dims, seq_len=tiny.seq_len)
    except torchtitan_tp_validate.TPCompatError as error:
        return Verdict("refused", sorted({violation.code for violation in error.violations}), str(error))
    except torchtitan_tp_validate.PlanError as error:
        return Verdict("not validated", text=str(error))
    except Exception as error:
        return Verdict("crashed", text=f"{type(error).__name__}: {error}")
    return Verdict("compatible")


def _report_difference(seen: Iterator[Step], expected: list[Step], report: Report) -> None:
    difference = Difference()
    report.loss_difference = 0.0
    for step, wanted in zip(seen, expected, strict=True):
        loss = relative_difference(step.loss - wanted.loss, wanted.loss)
        report.loss_difference = max(report.loss_difference, loss)
        difference.add(step.gradients, wanted.gradients)
        report.gradient_difference = difference.relative
        report.worst_gradient = difference.worst
    report.stage = "done"
    report.message = difference.reshaped
    worst = max(report.loss_difference, difference.relative)
    report.truth = EQUAL if worst <= TOLERANCE and difference.reshaped is None else DIFFERENT


@contextmanager
def _described(report: Report) -> Iterator[None]:
    """Turn what is raised into a line of the report."""
    try:
        yield
    except Exception as error:
        report.truth = INVALID if report.stage.startswith("reference") else EXCEPTION
        report.error_type = type(error).__name__
        report.message = str(error)


if __name__ == "__main__":
    main()
