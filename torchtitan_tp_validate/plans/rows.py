"""What torchtitan 0.3.x asks of a dimension that it splits and that does not consist of heads.

One backend pads an uneven shard and goes on, wrongly; behind the others DTensor can tell an uneven shard from
an even one, and fails on empty ones only.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchtitan_tp_validate.degrees import Degrees, token_field
from torchtitan_tp_validate.plan import PlanBuilder, Split
from torchtitan_tp_validate.rules import RULES

_SILENTLY_WRONG = (
    "torchtitan pads the dimension to a multiple of the degree and trains on SILENTLY,\n"
    "  with other losses and gradients than the model's own, and no error at all."
)
_HANGS = (
    "the loss raises a ValueError on the last rank only, and every other rank hangs\n"
    "  until its collectives time out."
)
_DIES_OR_SILENTLY_WRONG = (
    "the first forward pass dies, or the dimension is padded and training is SILENTLY wrong."
)
_SEQUENCE = "the Trainer refuses it when the process groups are up; without a Trainer, forward aborts."
_EMPTY_SHARD = "the rank that is left without a part dies, or waits for ever, and so do the others."
_OUT_OF_STEP = 'the first forward pass dies with "The size of tensor a must match the size of tensor b".'

EXPERTS_DIE = "the first forward pass dies with \"shape '[2, -1]' is invalid for input of size ...\"."
"""What a run does whose expert parallel ranks would hold unequal numbers of experts."""
DIES_WITH_IMAGES = "the first forward pass with images dies; torchtitan does not look at these heads."
"""What a run does that cuts the heads of a vision encoder."""

_PADS_UNEVEN_SHARDS = "spmd_types"


def pads(degrees: Degrees) -> bool:
    """Whether the run's backend pads what it cannot split evenly."""
    return degrees.spmd_backend == _PADS_UNEVEN_SHARDS


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
        consequence = {"TP006": _HANGS, "TP011": _DIES_OR_SILENTLY_WRONG}.get(code, _SILENTLY_WRONG)
        silent = consequence is not _HANGS
        findings.add(code, size, consequence, silent=silent, layers=layers, place=place, label=label)
        return
    # gpt_oss: one weight holds both halves of the gated projection, another takes their product.
    for split, consequence in ((Split.NOT_EMPTY, _EMPTY_SHARD), (Split.IN_STEP, _OUT_OF_STEP)):
        if split is Split.NOT_EMPTY or has_double:
            findings.add(code, size, consequence, split=split, layers=layers, place=place, label=label)


def splits_sequence(degrees: Degrees) -> bool:
    """Return whether a run splits its sequence over the TP axis, and cannot do so unevenly.

    It is split between the blocks by sequence parallelism, and at the experts by expert parallelism in any
    case.
    """
    return pads(degrees) and (degrees.sequence_parallel or degrees.ep > 1)


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
        _SEQUENCE,
        place=f"training.{field}",
        label="" if field == RULES["TP009"].dim else field,
        multiple=2 * degrees.cp if degrees.cp > 1 else 1,
    )
