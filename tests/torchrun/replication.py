"""One rank of a torchrun test of KV-head replication: train a tiny model with it, and stock at TP = 1.

    torchrun --nproc-per-node 4 -m tests.torchrun.replication --case qwen3:8/2 llama3:8/1:tp=2 --out DIR

A case is ``FAMILY:N_HEADS/N_KV_HEADS[:KEY=VALUE,...]``; the keys are the fields of `How`. The ranks that TP
leaves shard the data, and each has its own part of the batch. ``DIR/rank{RANK}.json`` holds a `Report` for
every case; the exit status is 0 only when every one was trained.
"""

from __future__ import annotations

import argparse
import importlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

import torchtitan_tp_validate
from tests.torchrun import lines
from tests.torchrun.lines import TinyModel
from tests.torchrun.replication_pipeline import Pipeline, build_pipeline
from tests.torchrun.training import (
    Difference,
    copy_weights,
    join_process_group,
    load_weights,
    named_parameters,
    whole,
)

SEED = 20
STEPS = 3
LEARNING_RATE = 0.1
MAX_NORM = 1.0
BATCH_SIZE = 2

_REPLICATION_0_2 = "torchtitan_tp_validate.kv_replication.torchtitan_0_2"

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class How:
    """How a case is run.

    Attributes:
        tp: tensor parallel degree.
        pp: pipeline stages, 1 or 2.
        ep: expert parallel degree, out of the ranks of FSDP and TP.
        replicate: degree of replicated data parallelism (HSDP); what is left of the ranks shards.
        backend: ``spmd_backend`` of 0.3.x.
        sp: sequence parallel, 0 or 1.
        ac: activation checkpointing, ``none``, ``full`` or ``selective``.
        compile: backend of torch.compile, or ``none``.
        stock: train without replication (1), to see how exact stock torchtitan is.
        unchecked: leave all checks out (1), ours and torchtitan's, to see what they prevent.
        head_dim: rows of a head; 0 means that of the line.
    """

    tp: int = 4
    pp: int = 1
    ep: int = 1
    replicate: int = 1
    backend: str = ""
    sp: int = 1
    ac: str = "none"
    compile: str = "none"
    stock: int = 0
    unchecked: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class Case:
    """A family with head counts, and how it is run."""

    family: str
    n_heads: int
    n_kv_heads: int
    how: How

    @classmethod
    def parse(cls, text: str) -> Case:
        family, heads, *more = text.split(":")
        n_heads, n_kv_heads = map(int, heads.split("/"))
        kinds = {name: type(value) for name, value in asdict(How()).items()}
        given = [setting.split("=") for setting in more[0].split(",")] if more else []
        how = How(**{name: kinds[name](value) for name, value in given})
        return cls(family, n_heads, n_kv_heads, how)


@dataclass
class Report:
    """What one rank saw. Differences are of the whole gradients, over all parameters and steps."""

    case: str
    rank: int
    status: str = "raised"
    stage: str = "start"
    message: str | None = None
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reference_norms: list[float] = field(default_factory=list)
    max_rel_gradient_difference: float = 0.0
    worst_gradient: str | None = None
    compared_gradients: int = 0
    rows_of_wk: list[int] = field(default_factory=list)


@dataclass
class Step:
    """Loss, gradients before clipping and their norm, of one training step."""

    loss: float
    norm: float
    gradients: Gradients


@record  # type: ignore[untyped-decorator]
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    line = lines.installed_line()
    device = join_process_group(line)
    reports: list[Report] = []
    for text in options.case:
        reports.append(Report(case=text, rank=dist.get_rank()))
        try:
            _run(Case.parse(text), line, device, reports[-1])
        except Exception as error:
            # Every rank has failed alike, or the next collective waits for the time limit.
            traceback.print_exc()
            reports[-1].message = f"{type(error).__name__}: {error}"
        path = options.out / f"rank{dist.get_rank()}.json"
        path.write_text(json.dumps([asdict(report) for report in reports], indent=2), encoding="utf-8")
    dist.destroy_process_group()
    if any(report.status not in ("trained", "refused") for report in reports):
        raise SystemExit(1)


def _run(case: Case, line: ModuleType, device: torch.device, report: Report) -> None:
    report.stage = "reference"
    weights, expected = reference_run(replace(case, how=How(head_dim=case.how.head_dim)), line, device)
    report.reference_losses = [step.loss for step in expected]
    report.reference_norms = [step.norm for step in expected]

    report.stage = "parallelize"
    pipeline = None
    try:
        if case.how.unchecked:
            tiny = build(case, line, replicate_kv_heads=True)
            if not hasattr(line, "UPSTREAM_CHECKS"):
                importlib.import_module(_REPLICATION_0_2).replicate_kv_heads(tiny.model, case.how.tp)
            model, context = parallelize(tiny, case)
        else:
            with replicating(not case.how.stock):
                tiny = build(case, line, replicate_kv_heads=not case.how.stock)
                pipeline = build_pipeline(tiny, case.how.tp, device) if case.how.pp > 1 else None
                if pipeline is None:
                    model, context = parallelize(tiny, case)
                else:
                    model, context = pipeline.stage, pipeline.context
    except torchtitan_tp_validate.TPValidateError as error:
        report.status, report.message = "refused", str(error)
        return
    report.stage = "initialize"
    tiny.initialize(model, device)
    names = dict(named_parameters(model))
    load(model, {name: weight for name, weight in weights.items() if pipeline is None or name in names})
    report.rows_of_wk = local_rows(model)

    report.stage = "train"
    dp = dist.get_world_size() // case.how.tp // case.how.pp
    difference = Difference()
    dp_rank = dist.get_rank() // case.how.tp
    where = {"dp": dp, "dp_rank": dp_rank, "ep": case.how.ep, "context": context, "pipeline": pipeline}
    steps = train(tiny, model, case.family, device, **where)
    for step, wanted in zip(steps, expected, strict=True):
        loss = torch.tensor(step.loss)
        dist.all_reduce(loss)
        report.losses.append(loss.item() / dist.get_world_size())
        report.norms.append(step.norm)
        seen = unfused(model, step.gradients)
        # A pipeline stage has its own parameters only.
        difference.add(seen, wanted.gradients if pipeline is None else {n: wanted.gradients[n] for n in seen})
    report.max_rel_gradient_difference = difference.relative
    report.worst_gradient = difference.worst
    report.compared_gradients = difference.compared
    report.status, report.stage = "trained", "done"


_references: dict[Case, tuple[Gradients, list[Step]]] = {}


def reference_run(case: Case, line: ModuleType, device: torch.device) -> tuple[Gradients, list[Step]]:
    """Weights, and the steps of stock training at TP = 1 from them, the same for every way to run a case."""
    if case not in _references:
        tiny = build(replace(case, how=replace(case.how, tp=1)), line, replicate_kv_heads=False)
        torch.manual_seed(SEED)
        tiny.initialize(tiny.model, device)
        weights = unfused(tiny.model, copy_weights(tiny.model))
        steps = train(tiny, tiny.model, case.family, device, dp=1, dp_rank=0)
        separate = [replace(step, gradients=unfused(tiny.model, step.gradients)) for step in steps]
        _references[case] = weights, separate
    return _references[case]


@contextmanager
def replicating(asked: bool) -> Iterator[None]:
    """Our guards in place, with KV-head replication if asked for."""
    torchtitan_tp_validate.install(replicate_kv_heads=asked)
    try:
        yield
    finally:
        torchtitan_tp_validate.uninstall()


def build(
    case: Case,
    line: ModuleType,
    *,
    replicate_kv_heads: bool,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> TinyModel:
    """The case's model, on meta, configured for its degrees."""
    how = case.how
    with mock.patch.object(line, "HEAD_DIM", how.head_dim or line.HEAD_DIM):
        tiny: TinyModel = line.build(
            case.family,
            n_heads=case.n_heads,
            n_kv_heads=case.n_kv_heads,
            tp=how.tp,
            ep=how.ep,
            upstream_check=not how.unchecked,
            sizes=sizes,
            spmd_backend=how.backend or None,
            replicate_kv_heads=replicate_kv_heads,
            sequence_parallel=bool(how.sp),
        )
    return tiny


Context = Callable[[], AbstractContextManager[None]]


def parallelize(tiny: TinyModel, case: Case) -> tuple[nn.Module, Context]:
    """The model, split over all ranks, and what torchtitan's Trainer has open around each step."""
    how = case.how
    parallel_dims = tiny.make_parallel_dims(how.tp, dist.get_world_size())
    if how.replicate > 1:
        parallel_dims = replace(
            parallel_dims,
            dp_replicate=how.replicate,
            dp_shard=parallel_dims.dp_shard // how.replicate,
        )
    args, kwargs = tiny.arguments(parallel_dims)
    if args:
        (_, job) = args
        job.training.mixed_precision_param = "float32"
        job.activation_checkpoint.mode = how.ac
        job.activation_checkpoint.selective_ac_option = "op"
        job.compile.enable, job.compile.backend = how.compile != "none", how.compile
        job.compile.components = ["model"]
    elif how.ac != "none" or how.compile != "none":
        from torchtitan.config import CompileConfig
        from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

        kinds = {"none": None, "full": FullAC, "selective": SelectiveAC}
        kind = kinds[how.ac]
        kwargs["ac_config"] = None if kind is None else kind.Config()
        if how.compile != "none":
            kwargs["compile_config"] = CompileConfig(enable=True, backend=how.compile, components=["model"])
    model = tiny.parallelize_fn(tiny.model, *args, **kwargs)
    if args:
        return model, nullcontext
    from torchtitan.distributed.utils import get_spmd_context

    # Activation checkpointing computes parts again in backward, and needs the mesh there too.
    return model, get_spmd_context(parallel_dims=parallel_dims)


def train(
    tiny: TinyModel,
    model: nn.Module,
    family: str,
    device: torch.device,
    *,
    dp: int,
    dp_rank: int,
    ep: int = 1,
    context: Context = nullcontext,
    pipeline: Pipeline | None = None,
) -> Iterator[Step]:
    """Train on the rows of each batch that are this rank's."""
    from torchtitan.distributed.utils import clip_grad_norm_

    parameters = dict(named_parameters(model))
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    if family.startswith("qwen3_5"):
        # On CPU its gated-delta layers read a batch as one stream: every rank has all of it.
        dp = 1
    for tokens, labels in batches(tiny, device):
        rows = slice(dp_rank % dp * BATCH_SIZE // dp, (dp_rank % dp + 1) * BATCH_SIZE // dp)
        model.zero_grad()
        if pipeline is not None:
            loss = torch.tensor(pipeline.step(tokens, labels))
        else:
            with context():
                loss = tiny.loss(model, tokens[rows].contiguous(), labels[rows].contiguous())
                loss.backward()
        gradients = {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}
        pp_mesh = pipeline.parallel_dims.get_mesh("pp") if pipeline else None
        clipping = {"foreach": False, "pp_mesh": pp_mesh, "ep_enabled": ep > 1}
        norm = clip_grad_norm_(list(parameters.values()), MAX_NORM, **clipping)
        optimizer.step()
        yield Step(loss=whole(loss).item(), norm=whole(norm).item(), gradients=gradients)


def batches(
    tiny: TinyModel, device: torch.device, steps: int = STEPS
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same tokens and labels on every rank, of shape (BATCH_SIZE, seq_len)."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        text = torch.randint(tiny.vocab_size, (BATCH_SIZE, tiny.seq_len + 1), generator=generator)
        text = text.to(device)
        yield text[:, :-1], text[:, 1:]


def unfused(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Gradients:
    """Weights or gradients of a fused QKV projection as those of three, by torchtitan's own hook."""
    result = dict(tensors)
    for name, module in model.named_modules():
        split = getattr(module, "_split_qkv_on_save", None)
        if split is not None:
            split(module, result, f"{name}.", {})
    return result


def load(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Weights of three projections into a model whose QKV projection may be fused."""
    merged = dict(weights)
    for name, module in model.named_modules():
        merge = getattr(module, "_merge_qkv_on_load", None)
        if merge is not None:
            merge(module, merged, f"{name}.")
    load_weights(model, merged)


def local_rows(model: nn.Module) -> list[int]:
    """Rows of wk and wv that this rank stores."""
    return [
        parameter.to_local().shape[0] if isinstance(parameter, DTensor) else parameter.shape[0]
        for name, parameter in named_parameters(model)
        if name.startswith("layers.") and name.endswith(("wk.weight", "wv.weight"))
    ]


if __name__ == "__main__":
    main()
