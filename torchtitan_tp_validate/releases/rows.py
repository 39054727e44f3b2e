"""What torchtitan 0.3.x asks of a dimension that it splits and that does not consist of heads.

One backend pads an uneven shard and goes on, wrongly; behind the others DTensor can tell an uneven shard from
an even one, and fails on empty ones only.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchtitan_tp_validate.degrees import Degrees, token_field
from torchtitan_tp_validate.plan import PlanBuilder, Split
from torchtitan_tp_validate.releases.base import SpmdBackend
from torchtitan_tp_validate.rules import RULES, Line

SPMD_BACKENDS: tuple[SpmdBackend, ...] = (
    SpmdBackend("spmd_types", pads_uneven_shards=True),
    SpmdBackend("partial_dtensor", shards_over_data_only=True, wraps_attention=True),
    SpmdBackend("full_dtensor"),
)
"""Source: ``ParallelismConfig`` and ``distributed/full_dtensor.py`` of torchtitan 0.3.0."""


def line_of(degrees: Degrees) -> Line:
    """Return what the run's backend makes of uneven splits."""
    return Line.SPMD_TYPES if pads(degrees) else Line.DTENSOR


def backend_of(degrees: Degrees) -> SpmdBackend:
    """Return the run's backend; one that is not known neither pads nor spares the TP axis."""
    known = (backend for backend in SPMD_BACKENDS if backend.name == degrees.spmd_backend)
    return next(known, SpmdBackend(degrees.spmd_backend))


def pads(degrees: Degrees) -> bool:
    """Return whether the run's backend pads what it cannot split evenly."""
    return backend_of(degrees).pads_uneven_shards


def note_rows(
    findings: PlanBuilder,
    degrees: Degrees,
    code: str,
    size: int,
    *,
    layers: Iterable[int] = (),
    place: str = "",
    label: str = "",
    has_double: bool = False,
) -> None:
    """Note a dimension that is split over TP and does not consist of heads.

    Args:
        findings: where to note it.
        degrees: of the run; the backend decides what is asked.
        code: which rule it falls under.
        size: in rows.
        layers: indices of the layers that have it.
        place: where it is, when not in a layer.
        label: its name, where the rule's own says too little.
        has_double: whether a dimension of twice the size must be cut in the same places.
    """
    layers = tuple(layers)
    if pads(degrees):
        findings.add(code, size, layers=layers, place=place, label=label)
        return
    findings.add(code, size, split=Split.NOT_EMPTY, layers=layers, place=place, label=label)
    if has_double:
        doubled = Line.DTENSOR_DOUBLED
        findings.add(code, size, split=Split.IN_STEP, layers=layers, place=place, label=label, line=doubled)


def splits_sequence(degrees: Degrees) -> bool:
    """Return whether a run splits its sequence over the TP axis, and cannot do so unevenly.

    It is split between the blocks by sequence parallelism, and at the experts by expert parallelism in any
    case. The DTensor backends take uneven parts, but the Trainer of 0.3.0 refuses them on every backend.
    """
    if pads(degrees):
        return degrees.sequence_parallel or degrees.ep > 1
    return degrees.in_trainer and degrees.sequence_parallel


def note_sequence(findings: PlanBuilder, degrees: Degrees) -> None:
    """Note the sequence length, where it is known and split.

    Context parallelism takes two pieces of it per rank, one from either end.
    """
    if degrees.seq_len is None or not splits_sequence(degrees):
        return
    field = token_field()
    findings.add(
        "TP009",
        degrees.seq_len,
        place=f"training.{field}",
        label="" if field == RULES["TP009"].dim else field,
        multiple=2 * degrees.cp if degrees.cp > 1 else 1,
    )
