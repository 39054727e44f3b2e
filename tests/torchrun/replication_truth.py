"""The truth of KV-head replication: which cases are run unchecked, and what the engine says of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torchtitan_tp_validate
from tests.torchrun.replication import Case, build

TOLERANCE = 1e-5
"""Relative, of losses and gradients: what is further off is another model."""
RANKS = 4
NORM_TOLERANCE = 1e-4
"""Of the norm of all gradients, which adds up their rounding: stock gpt_oss at TP 4 is off by 1.3e-5."""

HEADS = ("8/2", "8/1", "8/4", "4/1", "12/3", "12/6", "6/2", "6/3", "12/4")
FEWER_HEADS = ("8/2", "8/1", "12/3", "6/2")
"""On the backends that are not the line's default."""
ODD_HEADS = ("8/2:head_dim=18", "8/1:head_dim=18")
"""Two heads of 18 rows split over four ranks; a single one does not, and may leave ranks waiting."""


def stock_differs(family: str, backend: str, tp: int, line: ModuleType) -> bool:
    """Whether torchtitan itself comes out different from TP = 1 on four ranks, without replication.

    Its DTensor backends get gradients of models with experts wrong (those of ``ffn_norm`` by 100 %) where
    FSDP splits the batch besides TP: seen on 0.3.0 with qwen3_moe and gpt_oss, stock, at FSDP 2 x TP 2.
    """
    return backend not in ("", "spmd_types") and tp < 4 and "num_experts" in line.SIZES[family]


def cases(family: str, line: ModuleType) -> list[str]:
    """Head counts at TP 4, and a few at TP 2 x FSDP 2, without any check."""
    other_backends = getattr(line, "BACKENDS", {}).get(family, ())[1:]
    odd = ODD_HEADS if family == "llama3" else ()
    found = [f"{family}:{heads}:tp=4,unchecked=1" for heads in HEADS]
    found += [f"{family}:{heads}:tp=2,unchecked=1" for heads in ("8/1", "6/3", "9/3")]
    for backend in other_backends:
        found += [f"{family}:{heads}:tp=4,unchecked=1,backend={backend}" for heads in FEWER_HEADS]
        if not stock_differs(family, backend, tp=2, line=line):
            found += [f"{family}:{heads}:tp=2,unchecked=1,backend={backend}" for heads in ("8/1", "6/3")]
    # Last, since nothing can be run behind ranks that wait for each other.
    return found + [f"{family}:{heads},tp=4,unchecked=1" for heads in odd]


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
    """What the ranks' reports of a case amount to; one that is missing waited for another rank."""
    failed = [report for report in reports if report["status"] != "trained"]
    if failed:
        message = (failed[0]["message"] or "").splitlines()
        return Truth(case, False, f"{failed[0]['stage']}: {message[0][:90] if message else ''}")
    if len(reports) < RANKS:
        return Truth(case, False, "hangs")
    gradients = max(report["max_rel_gradient_difference"] for report in reports)
    loss, norm = _off(reports, "losses"), _off(reports, "norms")
    detail = f"loss off by {loss:.1e}, gradients by {gradients:.1e}, their norm by {norm:.1e}"
    return Truth(case, max(loss, gradients) < TOLERANCE and norm < NORM_TOLERANCE, detail)


def _off(reports: list[dict[str, Any]], name: str) -> float:
    """How far a number of each step is from that of TP = 1, at most and relative."""
    off: list[float] = [
        abs(seen / wanted - 1)
        for report in reports
        for seen, wanted in zip(report[name], report[f"reference_{name}"], strict=True)
    ]
    return max(off)
