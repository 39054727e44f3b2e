"""The two questions that everything else asks: does this degree work, and which ones do?"""

from __future__ import annotations

import operator
from typing import Any

from torchtitan_tp_validate.errors import PlanError, TPCompatError, TPDegreeError, Violation
from torchtitan_tp_validate.plans import read_plan
from torchtitan_tp_validate.rules import Plan, describe_layers


def validate_tp_compat(model_or_config: Any, parallel_dims: Any, *, model_name: str | None = None) -> None:
    """Refuse a tensor parallel degree that the model's plan cannot split evenly.

    Pure arithmetic on the configuration: no device, no process group and no collective is touched, so
    it can be called before `torch.distributed` is set up, and gives every rank the same answer.

    Args:
        model_or_config: a torchtitan model (any line; a pipeline stage of it too), or its config or
            model args.
        parallel_dims: torchtitan's ``ParallelDims``, or the TP degree as an int.
        model_name: the name to show instead of the one derived from the model.

    Raises:
        TPCompatError: the degree does not divide every sharded dimension.
        TPDegreeError: the degree is not a positive whole number.
        PlanError: the object has no head counts to judge by. Not raised at TP = 1, where nothing is
            sharded.
    """
    tp = tp_degree(parallel_dims)
    if tp == 1:
        return
    plan = read_plan(model_or_config, model_name=model_name)
    error = incompatibility(plan, tp)
    if error is not None:
        raise error
    refuse_unread(plan)


def valid_tp_degrees(model_or_config: Any) -> list[int]:
    """Every TP degree that splits the model evenly, ascending.

    Args:
        model_or_config: as in `validate_tp_compat`.

    Raises:
        PlanError: the object has no head counts to judge by.
    """
    plan = read_plan(model_or_config)
    refuse_unread(plan)
    return plan.valid_degrees()


def incompatibility(plan: Plan, tp: int) -> TPCompatError | None:
    """The error that ``tp`` deserves under ``plan``, or None when it is compatible."""
    broken = plan.violations(tp)
    if not broken:
        return None
    valid = plan.valid_degrees()
    return TPCompatError(
        tp=tp,
        model=plan.model,
        violations=tuple(
            Violation(
                code=dim.code,
                dim=dim.name,
                size=dim.size,
                layers=dim.layers,
                where=describe_layers(dim.layers, plan.n_layers),
                why=dim.rule.why,
                consequence=dim.consequence,
            )
            for dim in broken
        ),
        valid_degrees=valid,
        how_to_change=plan.how_to_change.format(tp=max(d for d in valid if d <= tp)),
    )


def refuse_unread(plan: Plan) -> None:
    """Never call a plan compatible that was not read to the end.

    Raises:
        PlanError: some layer, or every layer, could not be read.
    """
    if plan.unread or not plan.dims:
        shown = ", ".join(plan.unread[:3]) + (", ..." if len(plan.unread) > 3 else "")
        raise PlanError(
            f"Not validated: {plan.model} has {plan.n_layers} layers, and {len(plan.unread)} of them have no "
            f"attention or delta_net config with head counts{': ' + shown if shown else ''}."
        )


def tp_degree(parallel_dims: Any) -> int:
    """The TP degree of a ``ParallelDims`` or an int.

    Raises:
        TPDegreeError: it is not a positive whole number. ``True`` is not one: it is a flag that ended up
            in the wrong place.
    """
    value = getattr(parallel_dims, "tp", parallel_dims)
    where = "" if value is parallel_dims else f" (from {type(parallel_dims).__name__}.tp)"
    if not isinstance(value, bool):
        try:
            degree = operator.index(value)
        except TypeError:
            pass
        else:
            if degree >= 1:
                return degree
    raise TPDegreeError(
        f"Tensor parallel degree must be a whole number of at least 1, got {value!r} "
        f"of type {type(value).__name__}{where}. Pass torchtitan's ParallelDims or an int."
    )
