"""One rank of a torchrun test: parallelize a tiny torchtitan model, train it, compare it with TP = 1.

    torchrun --nproc-per-node 2 -m tests.torchrun.worker --case llama3:8/2:none --tp 2 --out DIR

``DIR/rank{RANK}.json`` holds a `Report` for every case. A refusal touches nothing, and stock torchtitan's
failures come on all ranks alike, so the next case follows either; in the end the first error that was not
a refusal is raised again, so that torchrun sees it. The exit status is 0 only when every case was trained.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

import torchtitan_tp_validate
from tests.torchrun import lines
from tests.torchrun.lines import TinyModel
from tests.torchrun.training import (
    Difference,
    collectives,
    copy_weights,
    join_process_group,
    load_weights,
    train,
)

SEED = 20


@dataclass
class Report:
    """What one rank saw. Differences are of the gradients, over all parameters and steps.

    `stage` is where the rank was when it ended.
    """

    case: str
    rank: int
    device: str = ""
    stage: str = "start"
    status: str = "raised"
    error_type: str | None = None
    message: str | None = None
    error_attrs: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    max_abs_gradient_difference: float = 0.0
    max_rel_gradient_difference: float = 0.0
    worst_gradient: str | None = None
    compared_gradients: int = 0
    sharded_parameters: int | None = None
    collectives_before_refusal: int | None = None
    groups_before_refusal: int | None = None
    collectives_in_training: int | None = None


@dataclass(frozen=True)
class Case:
    """A family with head counts, and how our guard is put before its parallelize function.

    The text form is ``FAMILY:N_HEADS/N_KV_HEADS:GUARD``. Guards: ``none``; ``wrapper``, our drop-in;
    ``install``, before the spec is built; ``install-late``, after.
    """

    family: str
    n_heads: int
    n_kv_heads: int
    guard: str

    @classmethod
    def parse(cls, text: str) -> Case:
        family, heads, guard = text.split(":")
        n_heads, n_kv_heads = map(int, heads.split("/"))
        return cls(family, n_heads, n_kv_heads, guard)

    def __str__(self) -> str:
        return f"{self.family}:{self.n_heads}/{self.n_kv_heads}:{self.guard}"


@record
def main() -> None:
    options = _parse()
    line = lines.installed_line()
    device = join_process_group(line)
    reports = []
    errors = []
    for case in options.case:
        reports.append(Report(case=str(case), rank=dist.get_rank(), device=str(device)))
        try:
            _run(case, options, line, device, reports[-1])
        except Exception as error:
            errors.append(error)
        path = Path(options.out) / f"rank{dist.get_rank()}.json"
        path.write_text(json.dumps([asdict(report) for report in reports], indent=2), encoding="utf-8")
    # The first rank to end with an error takes along all that have not reported yet.
    dist.barrier()
    if errors:
        raise errors[0]
    dist.destroy_process_group()
    if any(report.status != "trained" for report in reports):
        raise SystemExit(1)


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", type=Case.parse, nargs="+", required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--no-upstream-check", dest="upstream_check", action="store_false")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def _run(
    case: Case, options: argparse.Namespace, line: ModuleType, device: torch.device, report: Report
) -> None:
    try:
        _parallelize_and_train(case, options, line, device, report)
        report.status = "trained"
    except torchtitan_tp_validate.TPCompatError as error:
        report.status = "refused"
        report.error_attrs = {
            "valid_degrees": error.valid_degrees,
            "tp": error.tp,
            "model": error.model,
            "codes": [violation.code for violation in error.violations],
        }
        _describe(error, report)
    except BaseException as error:
        _describe(error, report)
        raise
    finally:
        torchtitan_tp_validate.uninstall()


def _parallelize_and_train(
    case: Case, options: argparse.Namespace, line: ModuleType, device: torch.device, report: Report
) -> None:
    if case.guard == "install":
        torchtitan_tp_validate.install()

    report.stage = "build"
    tiny = _build(case, line, tp=options.tp, upstream_check=options.upstream_check)

    report.stage = "guard"
    parallelize = _parallelize_function(case, tiny)

    report.stage = "parallel_dims"
    parallel_dims = tiny.make_parallel_dims(options.tp, dist.get_world_size())
    args, kwargs = tiny.arguments(parallel_dims)

    report.stage = "parallelize"
    groups_before, collectives_before = _groups(), sum(collectives())
    try:
        model = parallelize(tiny.model, *args, **kwargs)
    except Exception:
        report.collectives_before_refusal = sum(collectives()) - collectives_before
        report.groups_before_refusal = _groups() - groups_before
        report.sharded_parameters = _sharded(tiny.model)
        raise
    report.sharded_parameters = _sharded(model)

    if dist.get_world_size() != options.tp:
        raise ValueError("the comparison with TP = 1 needs as many ranks as the tensor parallel degree")
    report.stage = "reference"
    reference = _build(case, line, tp=1)
    torch.manual_seed(SEED)
    reference.initialize(reference.model, device)
    weights = copy_weights(reference.model)

    def enter(stage: str, part: str = "") -> None:
        report.stage = f"{part} {stage}".strip()

    how = {"steps": options.steps, "seed": SEED}
    in_reference = functools.partial(enter, part="reference")
    expected = list(train(reference, reference.model, device, **how, enter=in_reference))
    report.reference_losses = [step.loss for step in expected]

    report.stage = "initialize"
    tiny.initialize(model, device)
    load_weights(model, weights)

    collectives_before = sum(collectives())
    difference = Difference()
    for step, wanted in zip(train(tiny, model, device, **how, enter=enter), expected, strict=True):
        report.losses.append(step.loss)
        difference.add(step.gradients, wanted.gradients)
    report.max_abs_gradient_difference = difference.absolute
    report.max_rel_gradient_difference = difference.relative
    report.worst_gradient = difference.worst
    report.compared_gradients = difference.compared
    report.collectives_in_training = sum(collectives()) - collectives_before
    report.stage = "done"


def _build(case: Case, line: ModuleType, *, tp: int, upstream_check: bool = True) -> TinyModel:
    tiny: TinyModel = line.build(
        case.family,
        n_heads=case.n_heads,
        n_kv_heads=case.n_kv_heads,
        tp=tp,
        upstream_check=upstream_check,
    )
    return tiny


def _parallelize_function(case: Case, tiny: TinyModel) -> Callable[..., nn.Module]:
    module, function = tiny.entry_point
    if case.guard == "wrapper":
        module = f"torchtitan_tp_validate.wrappers.{tiny.wrapper}"
    elif case.guard == "install-late":
        torchtitan_tp_validate.install()
    else:
        return tiny.parallelize_fn
    parallelize: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
    return parallelize


def _groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def _sharded(model: nn.Module) -> int:
    return sum(isinstance(parameter, DTensor) for parameter in model.parameters())


def _describe(error: BaseException, report: Report) -> None:
    report.error_type = f"{type(error).__module__}.{type(error).__qualname__}"
    report.message = str(error)


if __name__ == "__main__":
    main()
