"""Run layouts: each is a rehearsal of its own, in a fork of this process, which has imported torchtitan."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, degrees_of_job
from torchtitan_tp_validate.errors import KVReplicationError, TPValidateError
from torchtitan_tp_validate.guards import install
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.rehearsal.children import Children, run_in_fork
from torchtitan_tp_validate.rehearsal.findings import Rehearsal, judged
from torchtitan_tp_validate.rehearsal.jobs import Request, installed_line, plain_job, pp, split
from torchtitan_tp_validate.rehearsal.jobs.batch import Batch, set_batch
from torchtitan_tp_validate.rehearsal.shrink import configs_below
from torchtitan_tp_validate.rehearsal.small_run import SmallRun
from torchtitan_tp_validate.rehearsal.truth.layouts import NO_FIELDS, Layout, Row
from torchtitan_tp_validate.rehearsal.truth.verdicts import repairs_of, verdict_of
from torchtitan_tp_validate.rehearsal.world import World
from torchtitan_tp_validate.releases import kv_replication_of, line_of

_PATIENCE_SECONDS = 90.0
_COMPILING_PATIENCE_SECONDS = 300.0
_HANGING_PATIENCE_SECONDS = 30.0
_LAYERS_PER_RANK = 3
"""Of a pipeline, which leaves none of two stages on each rank without a layer."""

_SEQ_LEN = 64
_BLOCK_SIZE = 8
_MOST_SHOWN = 3
_MOST_ERROR = 240


def run_layouts(layouts: Iterable[Layout], hanging: Collection[Layout] = ()) -> Iterator[Row]:
    """Yield what comes of each layout, one after the other.

    Upstream's registries are written to and its jobs are read once, so each has a process of its own.

    Args:
        hanging: those that are known to hang, and are not waited for as long as others.
    """
    line = installed_line()
    line.LAYERS_PER_RANK = _LAYERS_PER_RANK  # type: ignore[attr-defined]
    used = line.prepare(False)
    for layout, job in _jobs(line, layouts):
        yield _in_a_fork(line, job, layout, used, layout in hanging)


def judge_layouts(layouts: Iterable[Layout]) -> Iterator[str]:
    """Yield what the rules say of each layout, as `Row.verdict` has it."""
    line = installed_line()
    line.prepare(False)
    for layout, job in _jobs(line, layouts):
        job = copy.deepcopy(job)
        with _registry_left_alone(layout):
            put_into_job(job, layout)
            yield _verdict(job, layout)


def _jobs(line: ModuleType, layouts: Iterable[Layout]) -> Iterator[tuple[Layout, Any]]:
    """Yield each layout with the job of its model, which is parsed once."""
    jobs: dict[str, Any] = {}
    for layout in layouts:
        name, flavor, *_ = layout.model.split()
        if layout.model not in jobs:
            jobs[layout.model] = plain_job(line.parse(Request(model=name, flavor=flavor)))
        yield layout, jobs[layout.model]


@contextmanager
def _registry_left_alone(layout: Layout) -> Iterator[None]:
    """Put back what 0.2.x keeps of a model in its registry."""
    if layout.backend:
        yield
        return
    from torchtitan.protocols.train_spec import get_train_spec

    name, flavor, *_ = layout.model.split()
    registered = get_train_spec(name).model_args
    args, registered[flavor] = registered[flavor], copy.deepcopy(registered[flavor])
    try:
        yield
    finally:
        registered[flavor] = args


def _in_a_fork(line: ModuleType, job: Any, layout: Layout, used: set[str], hangs: bool) -> Row:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tp-validate-layout-") as folder:
        out = Path(folder)
        row = out / "row.json"

        def write_row() -> None:
            try:
                found = _run(line, job, layout, used, hangs, out)
            except Exception as error:  # what cannot be rehearsed is told, and the next goes on
                found = _row("", "not run", error=f"{type(error).__name__}: {error}")
            row.write_text(json.dumps(found), encoding="utf-8")

        run_in_fork(write_row, out / "output.txt")
        found = json.loads(row.read_text(encoding="utf-8"))
    return Row(layout, **found, seconds=f"{time.monotonic() - began:.1f}")


def _run(
    line: ModuleType, job: Any, layout: Layout, used: set[str], hangs: bool, out: Path
) -> dict[str, str]:
    import torch

    put_into_job(job, layout)
    degrees = degrees_of_job(job)
    verdict = _verdict(job, layout)
    # Without them the frozen weights of LoRA are trained in 0.3.0, shared heads or not.
    ranks = degrees.ranks * pp(job)
    repairs = repairs_of(job, ranks, replicate_kv_heads=True) if layout.lora_rank else layout.repaired
    if job.compile.enable:
        torch.compiler.set_stance("default")
    world = World(degrees, pp(job), microbatches=pp(job), cuts=())
    split(job, world)
    left_out = line.make_small(job, world.degrees, out)
    if layout.shared_heads and verdict == "fits":
        kv_replication_of(line_of(job)).put_into_job(job)
        install(replicate_kv_heads=True, repair=layout.lora_rank > 0)
    run = SmallRun(line, job, world, int(layout.batch), out, used, outputs=False, repairs=repairs)
    patience = _COMPILING_PATIENCE_SECONDS if job.compile.enable else _PATIENCE_SECONDS
    children = Children(out, _HANGING_PATIENCE_SECONDS if hangs else patience)
    try:
        run.run_reference(children)
    except TPValidateError as error:
        return _row(verdict, "not run", error=str(error))
    result = {
        "release": torchtitan_identity().name,
        "model": layout.model,
        "verdict": verdict,
        "degrees": {**dataclasses.asdict(world.degrees), "pp": world.pp},
        "cuts": (),
        "left_out": left_out,
        "microbatches": world.microbatches,
        "runs": [run.run_ranks(children)],
    }
    return _seen(verdict, judged(result))


def _verdict(job: Any, layout: Layout) -> str:
    ranks = degrees_of_job(job).ranks * pp(job)
    try:
        return verdict_of(
            job,
            ranks,
            replicate_kv_heads=layout.shared_heads is not None,
            repair=layout.lora_rank > 0,
            allow=layout.repaired,
        )
    except KVReplicationError as error:
        return str(error).partition("\n")[0]


def _seen(verdict: str, rehearsal: Rehearsal) -> dict[str, str]:
    # Who waited for others, when one had raised, has nothing to say, and who lost one only that.
    ends = sorted(rehearsal.ends, key=lambda end: (not end["error"], "by peer" in end["error"]))
    wrong = [
        " ".join(filter(None, [one.name or one.what, f"x {one.factor:.3f}", one.looks_like]))
        if one.what == "gradient"
        else f"{one.what} {one.name}".strip()
        for one in rehearsal.differences
    ]
    return _row(
        verdict,
        rehearsal.outcome,
        worst=f"{rehearsal.worst:.1e}",
        wrong="; ".join(dict.fromkeys(wrong[:_MOST_SHOWN])),
        stage=ends[0]["stage"] if ends else "",
        error=_first_line(ends[0]["error"]) if ends else "",
    )


def _row(
    verdict: str, outcome: str, worst: str = "", wrong: str = "", stage: str = "", error: str = ""
) -> dict[str, str]:
    return {
        **{"verdict": verdict, "outcome": outcome, "worst": worst, "wrong": wrong},
        **{"stage": stage, "error": _first_line(error)},
    }


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:_MOST_ERROR]


def put_into_job(job: Any, layout: Layout) -> None:
    """Set what a layout says in a job of its model."""
    for axis, degree in layout.degrees.items():
        field = PIPELINE_FLAG if axis == "pp" else FLAGS[axis]
        if hasattr(job.parallelism, field):
            setattr(job.parallelism, field, degree)
    job.parallelism.pipeline_parallel_schedule = layout.schedule
    size = int(layout.batch)
    set_batch(job, Batch(_SEQ_LEN, size * layout.degrees["pp"], size))
    put = _put_into_0_3 if layout.backend else _put_into_0_2
    put(job, layout)


def give_heads(job: Any, n_heads: int, n_kv_heads: int) -> None:
    """Give a job's model these heads."""
    if hasattr(job, "model_spec"):
        from torchtitan_tp_validate.rehearsal.models.torchtitan_0_3 import with_heads

        for layer in job.model_spec.model.layers:
            if layer.attention is not None:
                layer.attention = with_heads(layer.attention, n_heads, n_kv_heads)
    else:
        from torchtitan.protocols.train_spec import get_train_spec

        args = get_train_spec(job.model.name).model_args[job.model.flavor]
        args.n_heads, args.n_kv_heads = n_heads, n_kv_heads


def _put_into_0_2(job: Any, layout: Layout) -> None:
    from torchtitan.protocols.train_spec import get_train_spec

    job.parallelism.disable_loss_parallel = layout.loss == "whole"
    job.activation_checkpoint.mode = layout.checkpointing
    args = get_train_spec(job.model.name).model_args[job.model.flavor]
    if hasattr(args, "enable_weight_tying"):
        args.enable_weight_tying = layout.tied == "yes"
    if layout.shared_heads:
        give_heads(job, *layout.shared_heads)
    for name, value in layout.settings.items():
        if name not in NO_FIELDS:
            setattr(args, name, int(value))


def _put_into_0_3(job: Any, layout: Layout) -> None:
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    job.parallelism.spmd_backend = layout.backend
    job.training.disable_cuda_graphs = True
    job.parallelism.enable_sequence_parallel = layout.sequence_parallel == "on"
    if layout.loss == "plain":
        assert isinstance(job.loss, ChunkedLossWrapper.Config)
        job.loss = job.loss.loss_fn
    name, flavor, *_ = layout.model.split()
    settings = {k: value for k, value in layout.settings.items() if k not in NO_FIELDS}
    if settings:
        registry = import_module(f"torchtitan.models.{name}").model_registry
        job.model_spec.model = registry(flavor, **settings).model
    model = job.model_spec.model
    if layout.shared_heads:
        give_heads(job, *layout.shared_heads)
    if "compile" in layout.settings:
        job.compile.enable, job.compile.backend = True, layout.settings["compile"]
    if "balancer" in layout.settings:
        job.parallelism.context_parallel_load_balancer = layout.settings["balancer"]
    if layout.lora_rank:
        from torchtitan.components.lora import LoRAConverter

        adapted = layout.settings["on"].split("+") if "on" in layout.settings else None
        converter = LoRAConverter.Config(rank=layout.lora_rank, target_modules=adapted)
        model = converter.build().convert(model)
        job.model_spec.model = model
    if model.enable_weight_tying:
        # Its embedding would not be initialized otherwise.
        model.tok_embeddings.param_init = model.lm_head.param_init
    model.enable_weight_tying = layout.tied == "yes"
    for _, _, node in configs_below(model):
        if hasattr(node, "block_size"):
            # CP deals out whole blocks.
            node.block_size = _BLOCK_SIZE
    checkpointing = {"none": None, "full": FullAC.Config(), "selective": SelectiveAC.Config()}
    job.activation_checkpoint = checkpointing[layout.checkpointing]
