"""The two questions that everything else asks: does this degree work, and which ones do?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchtitan_tp_validate import advice
from torchtitan_tp_validate.degrees import Degrees, read_degrees
from torchtitan_tp_validate.errors import (
    PlanError,
    Problem,
    Refusal,
    RunError,
    TPCompatError,
    Violation,
)
from torchtitan_tp_validate.plan import Plan, describe_places
from torchtitan_tp_validate.releases import read_plan


def validate_tp_compat(
    model_or_config: Any,
    parallel_dims: Any,
    *,
    model_name: str | None = None,
    seq_len: int | None = None,
    replicate_kv_heads: bool = False,
) -> None:
    """Refuse a tensor parallel degree that the model's plan cannot split evenly.

    Pure arithmetic on the configuration: no device, no process group and no collective is touched, so
    it can be called before `torch.distributed` is set up, and gives every rank the same answer.

    Args:
        model_or_config: a torchtitan model (any line; a pipeline stage of it too), or its config or
            model args; or a Hugging Face model, config or the content of its ``config.json``, judged by
            transformers' native tensor parallelism.
        parallel_dims: torchtitan's ``ParallelDims``, or the TP degree as an int. Of the former the expert
            and data parallel degrees and, in 0.3.x, the SPMD backend count too; an int means no other
            parallelism, and no other backend than the default.
        model_name: the name to show instead of the one derived from the model.
        seq_len: ``training.seq_len`` in tokens, to be judged too; the guards know it.
        replicate_kv_heads: judge a run with KV-head replication (see ``kv_replication``): where it is
            supported, a TP degree may be a multiple of ``n_kv_heads`` too.

    Raises:
        TPCompatError: a degree does not fit a dimension that it splits.
        TPDegreeError: a degree is not a positive whole number.
        PlanError: the object has no sizes to judge by. Not raised without tensor and expert parallelism,
            where nothing is split.
    """
    degrees = read_degrees(parallel_dims)
    degrees = replace(degrees, seq_len=seq_len, replicate_kv_heads=replicate_kv_heads)
    judge(model_or_config, degrees, model_name=model_name)


def judge(model_or_config: Any, degrees: Degrees, *, model_name: str | None = None) -> Plan | None:
    """`validate_tp_compat` for degrees that are read already; the plan, or None where nothing is split."""
    if degrees.splits_nothing:
        return None
    plan = read_plan(model_or_config, degrees, model_name=model_name)
    raise_if_incompatible(plan, degrees)
    return plan


def raise_if_incompatible(plan: Plan, degrees: Degrees, problems: Sequence[Problem] = ()) -> None:
    """Raise what these degrees deserve under ``plan``, which is nothing when they are compatible.

    Args:
        problems: what else speaks against the run, as a whole.

    Raises:
        TPCompatError: a degree does not fit.
        RunError: all degrees fit, but there are problems.
        PlanError: the plan was not read to the end.
    """
    error = run_error(plan, degrees, problems)
    if error is not None:
        raise error.settled()
    raise_if_unread(plan.at(degrees))


def run_error(plan: Plan | None, degrees: Degrees, problems: Sequence[Problem]) -> RunError | None:
    """Return the error that a run deserves, with everything that speaks against it, or None.

    Args:
        plan: what its model splits; None where that is nothing, or not known.
        degrees: its own.
        problems: of the run as a whole; those that only warn count for nothing.
    """
    grave = tuple(problem for problem in problems if not problem.warns)
    error = None if plan is None else compat_error(plan, degrees, grave)
    return error or (RunError(grave) if grave else None)


def valid_tp_degrees(
    model_or_config: Any,
    parallel_dims: Any = 1,
    *,
    seq_len: int | None = None,
    replicate_kv_heads: bool = False,
) -> list[int]:
    """Return the TP degrees that `validate_tp_compat` accepts together with the other degrees, ascending.

    1 is one of them wherever there is no expert parallelism, since a run that splits nothing is not judged.
    Where nothing of the model is split over the TP axis, any degree works: those up to its number of heads
    are listed where that is known, else [1].

    Args:
        model_or_config: as in `validate_tp_compat`.
        parallel_dims: a ``ParallelDims`` with the other degrees and the backend. Its TP degree is ignored,
            but for an ``etp`` of torchtitan 0.2.x that equals it, which follows it.
        seq_len: as in `validate_tp_compat`.
        replicate_kv_heads: as in `validate_tp_compat`.

    Raises:
        PlanError: the object has no sizes to judge by.
    """
    degrees = read_degrees(parallel_dims)
    degrees = replace(degrees, seq_len=seq_len, replicate_kv_heads=replicate_kv_heads)
    plan = read_plan(model_or_config, degrees)
    raise_if_unread(plan)
    return plan.valid_degrees()


def compat_error(plan: Plan, degrees: Degrees, problems: tuple[Problem, ...] = ()) -> TPCompatError | None:
    """Return the error that these degrees deserve under ``plan``, or None when nothing speaks against them.

    What the error has to say is worked out when it is asked.
    """
    if degrees.splits_nothing or plan.allows(degrees):
        return None
    tell = functools.partial(refusal, plan, degrees, problems)
    return TPCompatError.told_by(tell, tp=degrees.tp, model=plan.model)


def refusal(plan: Plan, degrees: Degrees, problems: tuple[Problem, ...] = ()) -> Refusal:
    """Return all that there is to say about degrees that the plan does not allow."""
    broken = plan.violations(degrees)
    more = plan.added_by_replication(degrees) if any(dim.code == "TP002" for dim in broken) else []
    working = advice.values_that_work(plan, degrees, broken)
    return Refusal(
        violations=tuple(
            Violation(
                code=dim.code,
                dim=dim.name,
                size=dim.size,
                degree=degrees.of(dim.axis),
                problem=dim.problem(degrees.of(dim.axis)),
                layers=dim.layers,
                where=describe_places(dim, plan.n_layers),
                why=dim.rule.why,
                consequence=dim.otherwise.text,
                silent=dim.otherwise.silent,
            )
            for dim in broken
        ),
        valid_degrees=plan.valid_degrees(degrees=degrees),
        replication_degrees=more,
        headline=advice.headline(plan, degrees, broken[0], working),
        advice=advice.what_works(plan, degrees, broken, working, _about_replication(plan, degrees, more)),
        problems=problems,
    )


def _about_replication(plan: Plan, degrees: Degrees, more: Sequence[int]) -> str:
    """Return what to say of KV-head replication, a line or nothing."""
    if more:
        return f"KV-head replication ({plan.how_to_replicate}) adds: {', '.join(map(str, more))}.\n"
    if degrees.replicate_kv_heads and not plan.shared_kv:
        return "KV-head replication was asked for, but is not available for this model here.\n"
    return ""


def raise_if_unread(plan: Plan) -> None:
    """Never call a plan compatible that was not read to the end.

    Raises:
        PlanError: some layer, or every layer, could not be read.
    """
    # A vocabulary or a sequence length alone is no model. (A model of which nothing is split is one.)
    if not plan.n_layers:
        raise PlanError(f"{plan.model} has 0 layers, so there is nothing to judge.")
    if plan.unread:
        shown = ", ".join(plan.unread[:3]) + (", ..." if len(plan.unread) > 3 else "")
        have = "has" if len(plan.unread) == 1 else "have"
        raise PlanError(
            f"{plan.model} has {plan.n_layers} layers, and {len(plan.unread)} of them {have} "
            f"no attention or delta_net config with head counts: {shown}."
        )
