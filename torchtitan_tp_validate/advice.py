"""What works instead of degrees that do not: values of the axis at fault, else the nearest layout.

Nothing is offered that was not asked of the engine first, and nothing that leaves ranks over where the
requested degrees leave none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from torchtitan_tp_validate.degrees import FLAGS, Axis, Degrees, noun
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.plan import Plan, ShardedDim, Split, divisors, ranges

_MOST_LAYOUTS = 300
"""How many layouts are tried, the nearest first."""


Working = dict[Axis, list[int]]
"""Axis -> its degrees that work while the others stay; an axis that has none is left out."""


def values_that_work(plan: Plan, degrees: Degrees, broken: Sequence[ShardedDim]) -> Working:
    """Return what works by itself, of each axis at fault.

    Args:
        plan: the model's.
        degrees: those that do not fit.
        broken: the dimensions that do not allow them, the first first.
    """
    axes = dict.fromkeys(dim.axis for dim in broken)
    # Tensor parallelism is what people came to change, and it leaves other rows for FSDP to cut.
    offered = dict.fromkeys([*axes, Axis.TP] if degrees.tp > 1 else axes)
    return {axis: values for axis in offered if (values := _values(plan, degrees, axis))}


def headline(plan: Plan, degrees: Degrees, dim: ShardedDim, working: Working) -> str:
    """Return the first line of a refusal, in the words of upstream issue #2574.

    Args:
        plan: the model's.
        degrees: those that do not fit.
        dim: the first dimension that does not allow them.
        working: what `values_that_work` gave.
    """
    axis = dim.axis
    must = "must divide" if dim.split is Split.EVEN and dim.multiple == 1 else "does not fit"
    # Where another axis is at fault too, no value of this one works; this is still as far as it goes.
    best = max(working.get(axis) or _values(plan, degrees, axis, alone=True), default=None)
    limit = f"no {axis.noun.lower()} works" if best is None else f"max supported {axis.name} is {best}"
    return f"{axis.noun} ({degrees.of(axis)}) {must} {dim.name} ({dim.size}). For {plan.model}, {limit}."


def what_works(
    plan: Plan, degrees: Degrees, broken: Sequence[ShardedDim], working: Working, replication: str
) -> str:
    """Return the last lines of a refusal: what works instead, and how to change to it.

    Args:
        plan: the model's.
        degrees: those that do not fit.
        broken: the dimensions that do not allow them, the first first.
        working: what `values_that_work` gave.
        replication: what there is to say of KV-head replication, a line or nothing.
    """
    axes = list(dict.fromkeys(dim.axis for dim in broken))
    # What could not be read may speak against any of them.
    work = "fit what could be read" if plan.at(degrees).unread else "work"
    if working:
        lists = [
            f"{'Degrees' if axes == [Axis.TP] else f'{axis.noun}s'} that {work}: {_listed(axis, values)}."
            for axis, values in working.items()
        ]
        axis, values = next(iter(working.items()))
        nearest = degrees.vary(**{axis.value: _nearest(values, degrees.of(axis))})
        return "\n".join(lists) + f"\n{replication}To change it: {_how(plan, degrees, nearest)}"
    layout = _nearest_layout(plan, degrees)
    if layout is not None:
        changed = " with ".join(
            f"{noun(field).lower()} {getattr(layout, field)}" for field in _changed(degrees, layout)
        )
        alone = " or ".join(axis.noun.lower() for axis in axes)
        return (
            f"No other {alone} works by itself. The nearest degrees that {work}: {changed}.\n"
            f"{replication}To change it: {_how(plan, degrees, layout)}"
        )
    at_fault = next(iter(_violations(plan, _least(degrees))), None)
    if at_fault is None:
        return f"{replication}No other degree is known to work: the model could not be read at any."
    size = f"{at_fault.name} ({at_fault.size}) {at_fault.problem(1)}"
    return f"{replication}No degree works: {size}, so change it instead."


def _values(plan: Plan, degrees: Degrees, axis: Axis, *, alone: bool = False) -> list[int]:
    """Return the degrees of one axis that work while the others stay.

    Args:
        alone: whether only what this axis splits counts.
    """
    runs = (degrees.vary(**{axis.value: value}) for value in plan.candidates(axis, degrees))
    if alone:
        return [run.of(axis) for run in runs if all(d.axis is not axis for d in _violations(plan, run))]
    return [run.of(axis) for run in runs if _works(plan, degrees, run)]


def _works(plan: Plan, degrees: Degrees, other: Degrees) -> bool:
    """Whether nothing speaks against other degrees than the requested ones, judged or not."""
    if degrees.makes_a_mesh and not other.makes_a_mesh:
        return False
    try:
        return plan.allows(other)
    except PlanError:  # what cannot be read is not offered
        return False


def _violations(plan: Plan, degrees: Degrees) -> Sequence[ShardedDim]:
    try:
        return plan.violations(degrees)
    except PlanError:
        return ()


def _nearest(values: Sequence[int], degree: int) -> int:
    """Return the largest that is not above, else the smallest."""
    return max((value for value in values if value <= degree), default=min(values))


def _nearest_layout(plan: Plan, degrees: Degrees) -> Degrees | None:
    """Return the layout that works and changes the fewest requested degrees, and them the least."""
    layouts = sorted(_layouts(plan, degrees), key=lambda layout: _distance(degrees, layout))
    tried = [*layouts[:_MOST_LAYOUTS], _least(degrees)]
    return next((layout for layout in tried if _works(plan, degrees, layout)), None)


def _layouts(plan: Plan, degrees: Degrees) -> Iterator[Degrees]:
    """Every other choice of the requested degrees, up to three of them changed at once."""
    fields = _requested(degrees)
    choices = {field: _choices(plan, degrees, field) for field in fields}
    for count in range(1, min(3, len(fields)) + 1):
        for changed in itertools.combinations(fields, count):
            for values in itertools.product(*(choices[field] for field in changed)):
                yield degrees.vary(**dict(zip(changed, values, strict=True)))


def _choices(plan: Plan, degrees: Degrees, field: str) -> list[int]:
    """Return the other values that a degree may take."""
    axis = next((axis for axis in Axis if axis.value == field), None)
    # Ranks that share or replicate the data can take the place of any others.
    possible = plan.candidates(axis, degrees) if axis in (Axis.TP, Axis.EP) else divisors(degrees.ranks)
    return [value for value in possible if value != getattr(degrees, field)]


def _requested(degrees: Degrees) -> list[str]:
    """Return the degrees that the run sets, by field; one that follows from another (etp) is none."""
    return [field for field in FLAGS if field != "etp" and getattr(degrees, field) > 1]


def _least(degrees: Degrees) -> Degrees:
    """None of the requested degrees."""
    return degrees.vary(**dict.fromkeys(_requested(degrees), 1))


def _changed(degrees: Degrees, layout: Degrees) -> list[str]:
    return [field for field in FLAGS if getattr(layout, field) != getattr(degrees, field)]


def _distance(degrees: Degrees, layout: Degrees) -> tuple[int, bool, bool, float]:
    """How much changes: how many degrees, the number of ranks (rather fewer than more), and how far."""
    changed = _changed(degrees, layout)
    factors = (abs(math.log2(getattr(layout, field) / getattr(degrees, field))) for field in changed)
    return len(changed), layout.ranks != degrees.ranks, layout.ranks > degrees.ranks, sum(factors)


def _how(plan: Plan, degrees: Degrees, layout: Degrees) -> str:
    """How to change to a layout, in the spelling of the installed line: every flag."""
    return "\nand: ".join(
        "\n  ".join(plan.how_to_change).format(flag=FLAGS[field], degree=getattr(layout, field))
        for field in _changed(degrees, layout)
    )


def _listed(axis: Axis, values: Sequence[int]) -> str:
    """All of them; of the ranks that shard the data nearly every number may work."""
    return ranges(values) if axis is Axis.FSDP else ", ".join(map(str, values))
