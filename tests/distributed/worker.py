"""One rank of a torchrun test: parallelize a tiny torchtitan model, train it, compare it with TP = 1.

    torchrun --nproc-per-node 2 -m tests.distributed.worker --case llama3:8/2:none --tp 2 --out DIR

Whatever happens, ``DIR/rank{RANK}.json`` holds a `Report` for every case that was begun. A refusal
touches nothing, so the next case follows it; any other error is raised again, so that torchrun sees it.
The exit status is 0 only when every case was trained.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor, distribute_tensor

import torchtitan_tp_validate
from tests.distributed import lines
from tests.distributed.lines import TinyModel

SEED = 20
BATCH_SIZE = 2
LEARNING_RATE = 0.1
# A machine with fewer cores than ranks can be slow to reach a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)

# Levels that activation checkpointing and torch.compile put into a parameter's name.
_WRAPPER_NAMES = ("_checkpoint_wrapped_module", "_orig_mod")


@dataclass
class Report:
    """What one rank saw. Differences are of the gradients, over all parameters and steps.

    `stage` is where the rank was when it ended. A relative difference is the largest absolute one
    within a parameter over the largest entry of that parameter's reference gradient.
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


@dataclass
class Step:
    """The loss of one training step and the whole gradient of every parameter."""

    loss: float
    gradients: dict[str, torch.Tensor]


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
    device = _join_process_group(line)
    reports = []
    try:
        for case in options.case:
            report = Report(case=str(case), rank=dist.get_rank(), device=str(device))
            reports.append(report)
            _run(case, options, line, device, report)
    finally:
        path = Path(options.out) / f"rank{dist.get_rank()}.json"
        path.write_text(json.dumps([asdict(report) for report in reports], indent=2), encoding="utf-8")
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
    groups_before, collectives_before = _groups(), _collectives()
    try:
        model = parallelize(tiny.model, *args, **kwargs)
    except Exception:
        report.collectives_before_refusal = _collectives() - collectives_before
        report.groups_before_refusal = _groups() - groups_before
        report.sharded_parameters = _sharded(tiny.model)
        raise
    report.sharded_parameters = _sharded(model)

    if dist.get_world_size() != options.tp:
        raise ValueError("the comparison with TP = 1 needs as many ranks as the tensor parallel degree")
    report.stage = "reference"
    reference = _build(case, line, tp=1)
    torch.manual_seed(SEED)
    reference.initialise(reference.model, device)
    weights = {name: weight.detach().clone() for name, weight in _parameters(reference.model)}
    expected = list(_train(reference, reference.model, options.steps, device, report))
    report.reference_losses = [step.loss for step in expected]

    report.stage = "initialise"
    tiny.initialise(model, device)
    _load(model, weights)

    collectives_before = _collectives()
    for step, wanted in zip(_train(tiny, model, options.steps, device, report), expected, strict=True):
        report.losses.append(step.loss)
        _compare(step.gradients, wanted.gradients, report)
    report.collectives_in_training = _collectives() - collectives_before
    report.stage = "done"


def _join_process_group(line: ModuleType) -> torch.device:
    """One GPU per rank where there are enough of them, otherwise all ranks on the CPU."""
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    line.prepare(device.type)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=COLLECTIVE_TIMEOUT)
    return device


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


def _collectives() -> int:
    """How many collectives this rank has entered so far, over all its process groups."""
    groups = dist.distributed_c10d._world.pg_map
    # The stand-in for a mesh dimension of size 1 never communicates, and has no counter.
    real = [group for group in groups if dist.get_backend(group) != "fake"]
    return sum(group._get_sequence_number_for_group() for group in real)


def _sharded(model: nn.Module) -> int:
    return sum(isinstance(parameter, DTensor) for parameter in model.parameters())


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under the names they have in a model that nothing has wrapped."""
    for name, parameter in model.named_parameters():
        yield ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES), parameter


@torch.no_grad()
def _load(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(_parameters(model))
    if parameters.keys() != weights.keys():
        raise AssertionError(f"parameters differ: {sorted(parameters.keys() ^ weights.keys())}")
    for name, parameter in parameters.items():
        weight = weights[name]
        if isinstance(parameter, DTensor):
            weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
        parameter.copy_(weight)


def _train(
    tiny: TinyModel, model: nn.Module, steps: int, device: torch.device, report: Report
) -> Iterator[Step]:
    # Plain SGD: an adaptive optimizer would turn rounding in a tiny gradient into a whole step.
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    batches = torch.Generator().manual_seed(SEED)
    part = report.stage if report.stage == "reference" else ""
    for _ in range(steps):
        shape = (BATCH_SIZE, tiny.seq_len + 1)
        text = torch.randint(tiny.vocab_size, shape, generator=batches).to(device)
        optimizer.zero_grad()
        report.stage = f"{part} forward".strip()
        loss = tiny.loss(model, text[:, :-1].contiguous(), text[:, 1:].contiguous())
        report.stage = f"{part} backward".strip()
        loss.backward()
        report.stage = f"{part} gradients".strip()
        # A parameter that the batch does not reach (a vision tower without images) has none.
        gradients = {
            name: _whole(parameter.grad)
            for name, parameter in _parameters(model)
            if parameter.grad is not None
        }
        report.stage = f"{part} optimizer".strip()
        optimizer.step()
        yield Step(loss=_whole(loss).item(), gradients=gradients)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _compare(seen: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], report: Report) -> None:
    if seen.keys() != wanted.keys():
        raise AssertionError(f"gradients differ: {sorted(seen.keys() ^ wanted.keys())}")
    for name, gradient in wanted.items():
        difference = (seen[name] - gradient).abs().max().item()
        scale = gradient.abs().max().item()
        relative = difference / scale if scale else float("inf") if difference else 0.0
        report.compared_gradients += 1
        report.max_abs_gradient_difference = max(report.max_abs_gradient_difference, difference)
        if relative >= report.max_rel_gradient_difference:
            report.max_rel_gradient_difference = relative
            report.worst_gradient = name


def _describe(error: BaseException, report: Report) -> None:
    report.error_type = f"{type(error).__module__}.{type(error).__qualname__}"
    report.message = str(error)


if __name__ == "__main__":
    main()
