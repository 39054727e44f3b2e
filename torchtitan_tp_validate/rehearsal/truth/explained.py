"""Why a layout came out as it did: as the rules say, or for one of few reasons that are nobody's to foresee.

Source: rehearsals of torchtitan 0.2.2 and 0.3.0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torchtitan_tp_validate.rehearsal.truth.layouts import Layout, Row

AGREES = "agrees"
UNEXPLAINED = "unexplained"
_NEVER_RUNS = "never runs"
_NOT_REHEARSED = "cannot be rehearsed"

KINDS = (AGREES, _NEVER_RUNS, _NOT_REHEARSED, UNEXPLAINED)
"""What an explanation begins with."""


@dataclass(frozen=True)
class Reason:
    """A reason why a layout that the rules let through did not come out equal.

    Attributes:
        kind: one of `KINDS`.
        line: of torchtitan, that has it.
        text: what it is.
        layouts: whether a layout has it.
        seen: a pattern of what a rank says.
    """

    kind: str
    line: str
    text: str
    layouts: Callable[[Layout], bool]
    seen: str


REASONS = (
    Reason(
        _NEVER_RUNS,
        "0.2",
        "llama4 hands flex attention the masks of all layers: no irope flavor runs, in one process either",
        lambda layout: "irope" in layout.model,
        "'dict' object has no attribute 'mask_mod'",
    ),
    Reason(
        _NOT_REHEARSED,
        "0.2",
        "the math kernel of a CPU, which is no ring, gives every CP rank the attention of the whole sequence",
        lambda layout: layout.degrees["cp"] > 1 and "llama" not in layout.model,
        "mat1 and mat2 shapes cannot be multiplied",
    ),
)


def count_kinds(line: str, rows: Iterable[Row]) -> list[int]:
    """Return how many rows of a line have an explanation of each of `KINDS`."""
    counts = Counter(explain(line, row).partition(":")[0] for row in rows)
    return [counts[kind] for kind in KINDS]


def explain(line: str, row: Row) -> str:
    """Return why a layout of a line came out as it did, or `UNEXPLAINED`."""
    if (row.verdict == "fits") == (row.outcome == "equal"):
        return AGREES
    for reason in REASONS:
        if reason.line == line and reason.layouts(row.layout) and re.search(reason.seen, row.error):
            return f"{reason.kind}: {reason.text}"
    return UNEXPLAINED
