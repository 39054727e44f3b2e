"""Why a layout came out as it did: by our rules, by a fault of torchtitan's, or by its own refusal."""

from __future__ import annotations

from torchtitan_tp_validate.rehearsal.truth.layouts import Row

UNEXPLAINED = "unexplained"
AGREES = "agrees"


def explain(line: str, row: Row) -> str:
    """Return why, in a word or two, or `UNEXPLAINED`."""
    del line
    fits = row.verdict == "fits"
    if fits == (row.outcome == "equal") and row.outcome != "not run":
        return AGREES
    return UNEXPLAINED
