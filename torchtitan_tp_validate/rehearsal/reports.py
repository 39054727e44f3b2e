"""What a rank reports of a case: how it ended, in which words, and the file that it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.rehearsal.cases import Case

EQUAL = "equal"
DIFFERENT = "different"
REFUSED = "refused"
EXCEPTION = "exception"
HANG = "hang"
CRASH = "crash"
INVALID = "invalid"
UNSTABLE = "unstable"

WORST_FIRST = (INVALID, CRASH, HANG, EXCEPTION, REFUSED, UNSTABLE, DIFFERENT, EQUAL)


@dataclass
class Verdict:
    """What our engine says: ``compatible``, ``refused``, ``not validated``, or ``crashed``."""

    word: str
    codes: list[str] = field(default_factory=list)
    text: str = ""


@dataclass
class Report:
    """How one case ended on one rank. Differences are relative, over all parameters and steps.

    Attributes:
        verdict: on a case that has no guard; nothing acts on it.
        truth: ``equal`` to one process, ``different`` from it, ``refused`` by a guard, ``exception``,
            ``hang`` or ``crash`` when this rank did not end it, ``invalid`` when one process itself fails,
            ``unstable`` when other random numbers give another answer.
        stage: where it was when it ended.
        message: what was raised, or which parameter has another shape than in one process.
        refusal: the attributes of our own error.
        touched: collectives entered and process groups opened by the parallelize function.
        sharded_parameters: in the model, behind the parallelize function.
        rows_of_wk: rows of wk and wv that this rank stores, by layer.
        checkpoints: what `checkpoints` saw.
        final: this is the outcome, on all ranks.
    """

    key: str
    rank: int
    verdict: Verdict | None = None
    truth: str = EXCEPTION
    stage: str = "start"
    error_type: str | None = None
    message: str | None = None
    refusal: dict[str, Any] = field(default_factory=dict)
    touched: tuple[int, int] | None = None
    sharded_parameters: int | None = None
    rows_of_wk: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reference_norms: list[float] = field(default_factory=list)
    loss_difference: float | None = None
    gradient_difference: float | None = None
    worst_gradient: str | None = None
    compared_gradients: int = 0
    collectives_in_training: int | None = None
    checkpoints: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    final: bool = False


def append_report(report: Mapping[str, Any], out: Path) -> None:
    """Add a report, as JSON data, to those of its rank."""
    with (out / f"rank{report['rank']}.jsonl").open("a", encoding="utf-8") as stream:
        print(json.dumps(report), file=stream)


def read_reports(out: Path, rank: int) -> list[dict[str, Any]]:
    """Return what a rank has reported so far."""
    path = out / f"rank{rank}.jsonl"
    if not path.exists():
        return []
    # What follows the last newline is still being written.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def final_reports(cases: Sequence[Case], out: Path) -> list[list[dict[str, Any]]]:
    """Return the final reports of all ranks on each case, up to the first case that some rank has none on."""
    ranks = range(max(case.world_size for case in cases))
    final = [{r["key"]: r for r in read_reports(out, rank) if r["final"]} for rank in ranks]
    ended = []
    for case in cases:
        reports = [of_rank[case.key] for of_rank in final[: case.world_size] if case.key in of_rank]
        if len(reports) < case.world_size:
            break
        ended.append(reports)
    return ended
