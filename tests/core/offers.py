"""What a refusal offers, read from its text as a person would, and whether it is then accepted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.degrees import FLAGS, Degrees, noun
from torchtitan_tp_validate.validate import judge

NOUNS = {"Degree": "tp"} | {noun(field): field for field in FLAGS}
FIELDS = {flag: field for field, flag in FLAGS.items()}


def accepts(model: Any, degrees: Degrees) -> bool:
    """The one verdict that counts."""
    try:
        judge(model, degrees)
    except (tpv.TPCompatError, tpv.PlanError):
        return False
    return True


def refusal(model: Any, degrees: Degrees) -> tpv.TPCompatError | None:
    try:
        judge(model, degrees)
    except tpv.TPCompatError as error:
        return error
    return None


def with_tp(degrees: Degrees, tp: int) -> Degrees:
    """The run with another TP degree; in torchtitan 0.2.x experts split over TP follow it."""
    etp = tp if degrees.etp == degrees.tp > 1 else degrees.etp
    return replace(degrees, tp=tp, etp=etp)


def offered(text: str, degrees: Degrees) -> Iterator[Degrees]:
    """Every run that a refusal's text says works."""
    for name, listed in re.findall(r"^(.*)s that work: ([\d, -]+)\.$", text, re.MULTILINE):
        for value in numbers(listed):
            run = with_tp(degrees, value)
            yield run if NOUNS[name] == "tp" else replace(degrees, **{NOUNS[name]: value})
    advised = re.findall(r"--parallelism\.(\w+) (\d+)", text.partition("To change it: ")[2])
    if advised:
        yield replace(degrees, **{FIELDS[flag]: int(value) for flag, value in advised})


def numbers(listed: str) -> Iterator[int]:
    for part in listed.split(", "):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def contradictions(model: Any, degrees: Degrees, largest: int, refused: Iterable[int]) -> list[str]:
    """Where what is said to work and what is accepted differ.

    Args:
        largest: up to which TP degree that is looked at.
        refused: TP degrees whose refusals are read, if they are refused.
    """
    valid = tpv.valid_tp_degrees(model, degrees)
    found = []
    for tp in range(1, largest + 1):
        if (tp in valid) is not accepts(model, with_tp(degrees, tp)):
            found.append(f"valid_tp_degrees says {valid} of TP {tp} in {degrees}")
    for run in (with_tp(degrees, tp) for tp in refused):
        error = refusal(model, run)
        if error is None:
            continue
        if error.valid_degrees != tpv.valid_tp_degrees(model, run):
            found.append(f"the error says {error.valid_degrees}, valid_tp_degrees {valid}, in {run}")
        bad = [other for other in offered(str(error), run) if not accepts(model, other)]
        found += [f"{run} is told that {other} works" for other in bad]
        if not any(word in str(error) for word in ("To change it: ", "so change it instead")):
            found.append(f"no advice in {error}")
    return found
