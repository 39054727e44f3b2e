"""Rehearse a torchtitan run: its own Trainer with a small model, on ranks of this machine."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.jobs import Request

TOLERANCE = 1e-4
"""Relative. Sums in another order differ by about 1e-6 in fp32."""

RANKS = 4
PATIENCE_SECONDS = 60.0
"""For ranks that make no progress. A stage of a small model takes a second or two."""

_PROGRAM = "torchtitan_tp_validate.rehearsal.program"
_MOST_OUTPUT = 2000


@dataclass(frozen=True)
class Difference:
    """What is not what one process computes.

    Attributes:
        what: ``loss``, ``gradient norm``, ``gradient``, ``copies`` or ``trainable``.
        name: the parameter, or empty.
        local_batch_size: at which it was seen; step: in which, from 1.
        distance: relative.
        factor: the multiple of the reference that it is closest to.
        looks_like: what that means, or empty.
        layout: how the ranks share the parameter.
    """

    what: str
    name: str
    local_batch_size: int
    step: int
    distance: float
    factor: float = math.nan
    looks_like: str = ""
    layout: str = ""


@dataclass(frozen=True)
class Rehearsal:
    """What came of a rehearsal.

    Attributes:
        model: the job's.
        outcome: ``equal``, ``differs``, ``dies`` or ``hangs``.
        verdict: what the rules say of the job as it is: ``fits``, or why not.
        degrees: those that it was rehearsed at, by axis, of more than one rank.
        cuts: what is smaller than in the job.
        worst: the largest relative difference of all that was compared.
        compared: how many gradients were.
        differences: the likeliest cause first.
        output: the module whose output is the first wrong one of a forward pass, or empty.
        ends: of ranks that did not end: rank, how, stage, error and traceback.
        stand_ins: kernels that a CPU does not have, and that were computed otherwise.
    """

    model: str
    outcome: str
    verdict: str
    degrees: Mapping[str, int]
    cuts: tuple[str, ...]
    worst: float
    compared: int
    differences: tuple[Difference, ...] = ()
    output: str = ""
    ends: tuple[Mapping[str, Any], ...] = ()
    stand_ins: tuple[str, ...] = field(default=())


def rehearse(
    arguments: Sequence[str] = (),
    *,
    model: str = "",
    flavor: str = "",
    degrees: Mapping[str, int | str] | None = None,
    replicate_kv_heads: bool = False,
    ranks: int = RANKS,
    patience: float = PATIENCE_SECONDS,
) -> Rehearsal:
    """Rehearse a run on the CPU, in processes of its own, of which none is left behind.

    Args:
        arguments: torchtitan's own command line; or else
        model, flavor: a model that torchtitan registers, or a package of your own, and
        degrees: field of torchtitan's parallelism config -> degree.
        replicate_kv_heads: with KV-head replication, as the launcher has it.
        ranks: the most that there may be; degrees are cut to fit.
        patience: seconds after which ranks that make no progress are taken to hang.

    Raises:
        RehearsalError: the run cannot be rehearsed, and why.
    """
    request = Request(tuple(arguments), model, flavor, tuple((degrees or {}).items()), replicate_kv_heads)
    with tempfile.TemporaryDirectory(prefix="tp-validate-rehearsal-") as folder:
        result = _run(Path(folder), {**asdict(request), "ranks": ranks, "patience": patience})
    return judged(result)


def _run(out: Path, request: Mapping[str, Any]) -> Any:
    """Run the program to its end, and return its result."""
    (out / "request.json").write_text(json.dumps(request), encoding="utf-8")
    log = out / "output.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            # It takes its ranks along, whatever it was doing.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace").strip()[-_MOST_OUTPUT:]
    path = out / "result.json"
    if not path.exists():
        raise RehearsalError(f"the rehearsal ended with status {process.returncode}:\n{text}")
    result = json.loads(path.read_text(encoding="utf-8"))
    if "problem" in result:
        raise RehearsalError(f"{result['problem']}{f':{chr(10)}{text}' if 'because' in result else '.'}")
    return result


def judged(result: Mapping[str, Any]) -> Rehearsal:
    """Return what the result of the program says."""
    runs = result["runs"]
    ends = tuple(end for run in runs for end in run["ends"] if end["how"] != "ended")
    degrees = {axis: n for axis, n in result["degrees"].items() if axis in _AXES and n > 1}
    found = [difference for run in runs for difference in _differences(run, degrees)]
    wrong = sorted(filter(_is_wrong, found), key=_likelihood)
    hung = any(end["how"] == "hung" for end in ends)
    return Rehearsal(
        model=result["model"],
        outcome="hangs" if hung else "dies" if ends else "differs" if wrong else "equal",
        verdict=result["verdict"],
        degrees=degrees,
        cuts=tuple(result["cuts"]),
        worst=max((difference.distance for difference in found), default=math.nan),
        compared=sum(difference.what == "gradient" for difference in found),
        differences=tuple(wrong),
        output=next(filter(None, map(_first_wrong_output, runs)), ""),
        ends=ends,
        stand_ins=tuple(
            sorted({name for run in runs for r in run["records"] if r for name in r["stand_ins"]})
        ),
    )


_AXES = {
    "tp": "TP",
    "cp": "CP",
    "ep": "EP",
    "pp": "pipeline",
    "dp_shard": "data shard",
    "dp_replicate": "data replica",
}


def _differences(run: Mapping[str, Any], degrees: Mapping[str, int]) -> Iterator[Difference]:
    """Yield everything that a run was compared in, the worst over its ranks of each."""
    worst: dict[tuple[str, str, int], Difference] = {}
    size, reference = run["local_batch_size"], run["reference"]
    trained = {name for record in run["records"] if record for name in record["trainable"]}
    for name in sorted(trained ^ {*reference["trainable"]}) if all(run["records"]) else ():
        yield Difference("trainable", name, size, 1, math.inf)
    for record in filter(None, run["records"]):
        seen = [Difference("copies", name, size, len(record["losses"]), math.inf) for name in record["drift"]]
        for what, field_name in (("loss", "losses"), ("gradient norm", "norms")):
            for step, (value, wanted) in enumerate(
                zip(record[field_name], reference[field_name], strict=False), 1
            ):
                if value is not None:
                    distance = abs(value - wanted) / abs(wanted)
                    seen.append(Difference(what, "", size, step, distance, value / wanted))
        for step, gradients in enumerate(record["gradients"], 1):
            for one in gradients:
                likely = _looks_like(one["factor"], one["rest"], degrees)
                seen.append(
                    Difference(
                        "gradient",
                        one["name"],
                        size,
                        step,
                        one["distance"],
                        one["factor"],
                        likely,
                        one["layout"],
                    )
                )
        for difference in seen:
            key = difference.what, difference.name, difference.step
            if key not in worst or difference.distance > worst[key].distance:
                worst[key] = difference
    yield from worst.values()


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


def _looks_like(factor: float, rest: float, degrees: Mapping[str, int]) -> str:
    """Say what a multiple of the right gradient comes of; nothing where it is not quite one."""
    if not math.isfinite(factor):
        return ""
    if abs(factor) < 1e-6 and rest < 1e-6:
        return "zero"
    if rest > 0.15:
        return ""
    for many in (True, False):
        names = [
            name for axis, name in _AXES.items() if axis in degrees and _near(factor, degrees[axis], many)
        ]
        if names:
            of = " or ".join(names)
            return f"counted once per {of} rank" if many else f"not summed over {of} ranks"
    return ""


def _near(factor: float, degree: int, many: bool) -> bool:
    expected = degree if many else 1 / degree
    return abs(factor - expected) < 0.06 * expected


def _likelihood(difference: Difference) -> tuple[Any, ...]:
    """Return a key that puts the cause before its consequences: explained, in the first step, far off."""
    return (
        difference.what not in ("trainable", "gradient"),
        difference.step,
        not difference.looks_like,
        -difference.distance,
    )
