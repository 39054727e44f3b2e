"""The truth of KV-head replication: which cases are run unchecked, and what the engine says of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torchtitan_tp_validate
from tests.distributed.replication import Case, build

TOLERANCE = 1e-5
"""Relative, of losses and gradients: what is further off is another model."""

HEADS = ("8/2", "8/1", "8/4", "4/1", "12/3", "12/6", "6/2", "6/3", "12/4")
ODD_HEADS = ("8/1:head_dim=18", "8/2:head_dim=18")
"""A head of 18 rows does not split over four ranks; two of them do."""


def cases(family: str) -> list[str]:
    """Head counts at TP 4, and a few at TP 2 x FSDP 2, without any check."""
    at_4 = [f"{family}:{heads}:tp=4,unchecked=1" for heads in HEADS]
    at_2 = [f"{family}:{heads}:tp=2,unchecked=1" for heads in ("8/1", "6/3", "9/3")]
    # Last, since ranks with parts of different sizes may wait for each other.
    odd = [f"{family}:{heads},tp=4,unchecked=1" for heads in ODD_HEADS] if family == "llama3" else []
    return at_4 + at_2 + odd


def refused(text: str, line: ModuleType) -> str:
    """The codes of the rules by which the engine refuses a case; empty when it does not."""
    case = Case.parse(text)
    how = replace(case.how, tp=1)
    tiny = build(replace(case, how=how), line, replicate_kv_heads=True)
    degrees = SimpleNamespace(tp=case.how.tp, ep=1, spmd_backend=case.how.backend or "spmd_types")
    try:
        torchtitan_tp_validate.validate_tp_compat(tiny.model, degrees, replicate_kv_heads=True)
    except torchtitan_tp_validate.TPCompatError as error:
        return " ".join(violation.code for violation in error.violations)
    return ""


@dataclass(frozen=True)
class Truth:
    """What happened in a case: it trained like one process, or not."""

    case: str
    equal: bool
    detail: str


def truth(case: str, reports: list[dict[str, Any]]) -> Truth:
    """What the ranks' reports of a case amount to; none at all means that they waited for each other."""
    if not reports:
        return Truth(case, False, "hangs")
    failed = [report for report in reports if report["status"] != "trained"]
    if failed:
        message = (failed[0]["message"] or "").splitlines()
        return Truth(case, False, f"{failed[0]['stage']}: {message[0][:90] if message else ''}")
    off = max(report["max_rel_gradient_difference"] for report in reports)
    loss = max(
        abs(seen / wanted - 1)
        for report in reports
        for seen, wanted in zip(report["losses"], report["reference_losses"], strict=True)
    )
    return Truth(case, max(off, loss) < TOLERANCE, f"loss off by {loss:.1e}, gradients by {off:.1e}")
