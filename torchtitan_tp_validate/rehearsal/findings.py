"""What a rehearsal found: the records of its ranks beside those of one process, and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchtitan_tp_validate.rehearsal.known import upstream_issue

TOLERANCE = 1e-4
"""Relative. Sums in another order differ by about 1e-6 in fp32."""


@dataclass(frozen=True)
class Difference:
    """What is not what one process computes.

    Attributes:
        what: ``uninitialized``, ``loss``, ``gradient norm``, ``validation loss``, ``gradient``,
            ``optimizer state``, ``copies`` or ``trainable``.
        name: the parameter, or empty.
        local_batch_size: at which it was seen; step: in which, from 1.
        distance: relative.
        factor: the multiple of the reference that it is closest to.
        looks_like: what that means, or empty.
        layout: how the ranks share the parameter.
        issue: the upstream fault that it comes of, where it is a known one.
    """

    what: str
    name: str
    local_batch_size: int
    step: int
    distance: float
    factor: float = math.nan
    looks_like: str = ""
    layout: str = ""
    issue: str = ""


@dataclass(frozen=True)
class Rehearsal:
    """What came of a rehearsal.

    Attributes:
        model: the job's.
        outcome: ``equal``, ``differs``, ``dies`` or ``hangs``.
        verdict: what the rules say of the job as it is: ``fits``, or why not.
        degrees: those that it was rehearsed at, by axis, of more than one rank.
        cuts: what is smaller than in the job.
        local_batch_sizes: those that it was run at, in sequences.
        worst: the largest relative difference of all that was compared.
        compared: how many gradients were.
        differences: the likeliest cause first.
        output: the module whose output is the first wrong one of a forward pass, or empty.
        ends: of ranks that did not end: rank, how, stage, error and traceback.
        stand_ins: what was computed otherwise than in the run: kernels that a CPU does not have, low
            precision.
        resumed: whether it was resumed from a checkpoint, too; validated: whether it validated.
    """

    model: str
    outcome: str
    verdict: str
    degrees: Mapping[str, int]
    cuts: tuple[str, ...]
    local_batch_sizes: tuple[int, ...]
    worst: float
    compared: int
    differences: tuple[Difference, ...] = ()
    output: str = ""
    ends: tuple[Mapping[str, Any], ...] = ()
    stand_ins: tuple[str, ...] = ()
    resumed: bool = False
    validated: bool = False


def judged(result: Mapping[str, Any]) -> Rehearsal:
    """Return what the result of the program says."""
    runs = result["runs"]
    ends = tuple(end for run in runs for end in run["ends"] if end["how"] != "ended")
    degrees = {axis: n for axis, n in result["degrees"].items() if axis in _AXES and n > 1}
    found = [difference for run in runs for difference in _differences(run, result)]
    wrong = sorted(filter(_is_wrong, found), key=_likelihood)
    hung = any(end["how"] == "hung" for end in ends)
    return Rehearsal(
        model=result["model"],
        outcome="hangs" if hung else "dies" if ends else "differs" if wrong else "equal",
        verdict=result["verdict"],
        degrees=degrees,
        cuts=tuple(result["cuts"]),
        local_batch_sizes=tuple(run["local_batch_size"] for run in runs if not run["resumed"]),
        worst=max((difference.distance for difference in found), default=math.nan),
        compared=sum(difference.what == "gradient" for difference in found),
        differences=tuple(wrong),
        output=next(filter(None, map(_first_wrong_output, runs)), ""),
        ends=ends,
        stand_ins=tuple(
            sorted(
                {*result["left_out"]}
                | {
                    name
                    for run in runs
                    for record in run["records"]
                    if record
                    for name in record["stand_ins"]
                }
            )
        ),
        resumed=any(run["resumed"] for run in runs),
        validated=any(run["reference"]["validations"] for run in runs),
    )


_AXES = {
    "tp": "TP",
    "cp": "CP",
    "ep": "EP",
    "pp": "pipeline",
    "dp_shard": "data shard",
    "dp_replicate": "data replica",
}


def _differences(run: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield everything that a run was compared in, the worst over its ranks of each."""
    size, reference, records = run["local_batch_size"], run["reference"], run["records"]
    meanings = _meanings(run, result)
    trained = {name for record in filter(None, records) for name in record["trainable"]}
    for name in sorted(trained ^ {*reference["trainable"]}) if all(records) else ():
        yield Difference("trainable", name, size, 1, math.inf)
    for name in reference["uninitialized"]:
        yield Difference("uninitialized", name, size, 1, math.inf)
    worst: dict[tuple[str, str, int], Difference] = {}
    for record in filter(None, records):
        first = record["first_step"]
        last = first + len(record["losses"]) - 1
        seen = [Difference("copies", name, size, last, math.inf) for name in record["drift"]]
        for state in record["states"]:
            name, distance, factor = state["name"], state["distance"], state["factor"]
            seen.append(Difference("optimizer state", name, size, last, distance, factor))
        for what, values in (
            ("loss", "losses"),
            ("gradient norm", "norms"),
            ("validation loss", "validations"),
        ):
            pairs = zip(record[values], reference[values][first - 1 :], strict=False)
            for step, (value, wanted) in enumerate(pairs, first):
                if value is not None:
                    distance = abs(value - wanted) / abs(wanted)
                    seen.append(Difference(what, "", size, step, distance, value / wanted))
        for step, gradients in enumerate(record["gradients"], first):
            for one in gradients:
                alike = sum(_near(other["factor"], one["factor"]) for other in gradients)
                looks_like = _looks_like(one["factor"], one["rest"], meanings[2 * alike > len(gradients)])
                name, distance, layout = one["name"], one["distance"], one["layout"]
                issue = upstream_issue(result["release"], name, looks_like) if distance > TOLERANCE else ""
                seen.append(
                    Difference(
                        *("gradient", name, size, step, distance, one["factor"], looks_like, layout, issue)
                    )
                )
        for difference in seen:
            key = difference.what, difference.name, difference.step
            if key not in worst or difference.distance > worst[key].distance:
                worst[key] = difference
    yield from worst.values()


_Meanings = list[tuple[str, str, float]]


def _meanings(run: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[_Meanings, _Meanings]:
    """Return what multiples of the right gradient mean, the likeliest first: a phrase, of what, how many.

    The first are of a gradient, the second of one among many with the same multiple: what reduces gradients
    over data ranks reduces all of them.
    """
    degrees = result["degrees"]
    axes = [(axis, name, degrees[axis]) for axis, name in _AXES.items() if degrees.get(axis, 1) > 1]
    counts = [("token of a step", run["labels"]), ("microbatch", result["microbatches"])]

    def of(axes: list[tuple[str, str, int]]) -> _Meanings:
        return [
            *(("counted once per {} rank", name, n) for _, name, n in axes),
            *(("not summed over {} ranks", name, 1 / n) for _, name, n in axes),
            *(("counted once per {}", name, n) for name, n in counts if n > 1),
        ]

    return of([axis for axis in axes if not axis[0].startswith("dp")]), of(axes)


def _first_wrong_output(run: Mapping[str, Any]) -> str:
    """Return the module that is done first of those that are wrong on any rank, and in a module that is.

    What is put right further out, as parts of a sum that a reduction puts together, is not wrong.
    """
    outputs: dict[str, float] = {}
    for record in filter(None, run["records"]):
        for name, distance in record["outputs"].items():
            outputs[name] = max(outputs.get(name, 0.0), math.inf if math.isnan(distance) else distance)
    wrong = {name for name, distance in outputs.items() if not distance <= TOLERANCE}
    for name in outputs:
        above = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        if name in wrong and all(module in wrong for module in above if module in outputs):
            return name
    return ""


def _is_wrong(difference: Difference) -> bool:
    return not difference.distance <= TOLERANCE


def _looks_like(factor: float, rest: float, meanings: _Meanings) -> str:
    """Say what a multiple of the right gradient comes of; nothing where it is not quite one."""
    if not math.isfinite(factor):
        return ""
    if abs(factor) < 1e-6 and rest < 1e-6:
        return "zero"
    if rest > 0.15 * abs(factor):
        return ""
    near = [(phrase, name) for phrase, name, n in meanings if _near(factor, n)]
    return (
        near[0][0].format(" or ".join(name for phrase, name in near if phrase == near[0][0])) if near else ""
    )


def _near(factor: float, expected: float) -> bool:
    return abs(factor - expected) <= 0.06 * abs(expected)


def _likelihood(difference: Difference) -> tuple[Any, ...]:
    """Return a key that puts the cause before its consequences: explained, in the first step, far off."""
    return (
        difference.what != "uninitialized",
        difference.what not in ("trainable", "gradient"),
        difference.step,
        not difference.looks_like,
        -difference.distance,
    )
