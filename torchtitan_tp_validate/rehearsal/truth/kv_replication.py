"""The truth of KV-head replication: which cases are run unchecked, and what their reports amount to."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.reports import DIFFERENT, EQUAL, UNSTABLE
from torchtitan_tp_validate.rehearsal.runner import Result

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


def cases(family: str, line: ModuleType) -> list[str]:
    """Return head counts at TP 4, and a few at TP 2 x FSDP 2, without any check."""
    other_backends = line.BACKENDS[family][1:]
    odd = ODD_HEADS if family == "llama3" else ()
    found = [f"{family}:{heads}:tp=4,unchecked=1" for heads in HEADS]
    found += [f"{family}:{heads}:tp=2,unchecked=1" for heads in ("8/1", "6/3", "9/3")]
    for backend in other_backends:
        found += [f"{family}:{heads}:tp=4,unchecked=1,backend={backend}" for heads in FEWER_HEADS]
        found += [f"{family}:{heads}:tp=2,unchecked=1,backend={backend}" for heads in ("8/1", "6/3")]
    return found + [f"{family}:{heads},tp=4,unchecked=1" for heads in odd]


def parse(text: str) -> Case:
    """Return the case of a recorded line: as the Trainer runs it, without any check, ours or torchtitan's."""
    settings = {"replicate_kv_heads": True, "as_trainer": True, "ac": "none"}
    return Case.parse(text.replace(",unchecked=1", ""), RANKS, **settings)


@dataclass(frozen=True)
class Truth:
    """What happened in a case: it trained like one process, or not."""

    case: str
    equal: bool
    detail: str


def truth(text: str, result: Result) -> Truth:
    """Return what a case of this text amounts to."""
    if result.truth not in (EQUAL, DIFFERENT, UNSTABLE):
        return Truth(text, False, f"{result.stage}: {result.detail[:90]}")
    gradients = max(report["gradient_difference"] for report in result.reports)
    loss, norm = _off(result, "losses"), _off(result, "norms")
    detail = f"loss off by {loss:.1e}, gradients by {gradients:.1e}, their norm by {norm:.1e}"
    return Truth(text, max(loss, gradients) < TOLERANCE and norm < NORM_TOLERANCE, detail)


def _off(result: Result, name: str) -> float:
    """Return how far a number of each step is from that of TP = 1, at most and relative."""
    off: list[float] = [
        abs(seen / wanted - 1)
        for report in result.reports
        for seen, wanted in zip(report[name], report[f"reference_{name}"], strict=True)
    ]
    return max(off)
