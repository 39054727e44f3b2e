"""Build a case's model, ask our engine about it, put a guard before it, and split it over the ranks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

import torchtitan_tp_validate
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import TinyModel
from torchtitan_tp_validate.rehearsal.pipeline import Pipeline, build_pipeline
from torchtitan_tp_validate.rehearsal.reports import Verdict
from torchtitan_tp_validate.rehearsal.training import Context


class Guards:
    """Our guards in this process. They stay from case to case until one wants something else."""

    def __init__(self) -> None:
        self._in_place = self._none = ("none", False)

    def before_build(self, case: Case) -> None:
        """Have in place what the case wants when its model is built."""
        wanted = (case.guard, case.replicate_kv_heads) if case.guard == "install" else self._none
        if wanted == self._in_place:
            return
        if self._in_place != self._none:
            torchtitan_tp_validate.uninstall()
        if wanted != self._none:
            torchtitan_tp_validate.install(replicate_kv_heads=case.replicate_kv_heads)
        self._in_place = wanted

    def after_build(self, case: Case) -> None:
        """Install what the case wants no sooner than when its model has been built."""
        if case.guard == "install-late":
            torchtitan_tp_validate.install()
            self._in_place = (case.guard, False)


def build(line: ModuleType, case: Case) -> TinyModel:
    """Return the case's model, on meta, configured for its degrees."""
    more: dict[str, Any] = {}
    if case.etp > 1:
        more["etp"] = case.etp
    if case.lora:
        from torchtitan.components.lora import LoRAConverter

        more["converters"] = [LoRAConverter.Config(rank=case.lora).build()]
    with mock.patch.object(line, "HEAD_DIM", case.head_dim or line.HEAD_DIM):
        tiny: TinyModel = line.build(
            case.family,
            n_heads=case.n_heads,
            n_kv_heads=case.n_kv_heads,
            tp=case.tp,
            ep=case.ep,
            upstream_check=case.upstream_check,
            sizes=case.sizes,
            spmd_backend=case.spmd_backend,
            replicate_kv_heads=case.replicate_kv_heads,
            sequence_parallel=bool(case.sp),
            **more,
        )
    return tiny


def judge_case(line: ModuleType, case: Case) -> Verdict:
    """Return what our engine says about a case; nothing is run."""
    tiny = build(line, case)
    return judge(tiny, make_parallel_dims(tiny, case), case)


def judge(tiny: TinyModel, parallel_dims: Any, case: Case) -> Verdict:
    """Return what our engine says about a model that nothing has parallelized yet."""
    try:
        torchtitan_tp_validate.validate_tp_compat(
            tiny.model, parallel_dims, seq_len=tiny.seq_len, replicate_kv_heads=case.replicate_kv_heads
        )
    except torchtitan_tp_validate.TPCompatError as error:
        codes = dict.fromkeys(violation.code for violation in error.violations)
        return Verdict("refused", list(codes), str(error))
    except torchtitan_tp_validate.PlanError as error:
        return Verdict("not validated", text=str(error))
    except Exception as error:
        return Verdict("crashed", text=f"{type(error).__name__}: {error}")
    return Verdict("compatible")


def parallelize(
    tiny: TinyModel, parallel_dims: Any, case: Case, device: torch.device
) -> tuple[nn.Module, Context, Pipeline | None]:
    """Return the model split over all ranks, what the Trainer has open around a step, and the pipeline."""
    if case.pp > 1:
        pipeline = build_pipeline(tiny, parallel_dims, device)
        return pipeline.stage, pipeline.context, pipeline
    args, kwargs = tiny.arguments(parallel_dims)
    if args:
        (_, job) = args
        if case.ac:
            job.activation_checkpoint.mode, job.activation_checkpoint.selective_ac_option = case.ac, "op"
        job.compile.enable, job.compile.backend = case.compile != "none", case.compile
        job.compile.components = ["model"]
    else:
        from torchtitan.config import CompileConfig
        from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

        if case.ac in ("full", "selective"):
            kwargs["ac_config"] = {"full": FullAC, "selective": SelectiveAC}[case.ac].Config()
        if case.compile != "none":
            kwargs["compile_config"] = CompileConfig(enable=True, backend=case.compile, components=["model"])
    model = _parallelize_function(tiny, case)(tiny.model, *args, **kwargs)
    if args or not case.as_trainer:
        return model, nullcontext, None
    from torchtitan.distributed.utils import get_spmd_context

    # Activation checkpointing computes parts again in backward, and needs the mesh there too.
    return model, get_spmd_context(parallel_dims=parallel_dims), None


def _parallelize_function(tiny: TinyModel, case: Case) -> Callable[..., nn.Module]:
    module, function = tiny.entry_point
    if case.guard == "wrapper":
        module = f"torchtitan_tp_validate.wrappers.{tiny.wrapper}"
    elif case.guard != "install-late":
        return tiny.parallelize_fn
    found: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
    return found


def make_parallel_dims(tiny: TinyModel, case: Case) -> Any:
    """Return torchtitan's ParallelDims of a case."""
    parallel_dims = tiny.make_parallel_dims(case.tp, case.world_size)
    return replace(parallel_dims, pp=case.pp, dp_replicate=case.dp_replicate, dp_shard=case.dp)
