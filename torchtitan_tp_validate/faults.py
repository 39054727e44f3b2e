"""The layouts in which a known fault of the installed torchtitan trains wrong, or kills what fits.

Which faults a model has in the installed torchtitan is the release's to say (`Run.faults`): by what is in its
source, not by its number. Here is in which layouts each shows. What it does, and the way out, is in `FAULTS`.

Source: every condition was measured, with layouts one step outside of it, by rehearsals of torchtitan 0.2.2
and 0.3.0, that of CKPT001 on four and eight ranks (docs/faults.md).
"""

from __future__ import annotations

from collections.abc import Callable

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, SHARDS_ARE_UNKNOWN
from torchtitan_tp_validate.errors import Problem
from torchtitan_tp_validate.layout import Run, splits_backward, stages
from torchtitan_tp_validate.rules import FAULTS, Line


def find_faults(run: Run) -> tuple[Problem, ...]:
    """Return the known faults that a run suffers from, in the order of `FAULTS`."""
    return tuple(
        Problem.of(rule, run.line, _TOLD.get(code, _trains_wrong)(run))
        for code, rule in FAULTS.items()
        if code in run.faults and run.line in rule.otherwise and _SHOWS[code](run)
    )


def not_judged(run: Run) -> tuple[str, ...]:
    """Return the known faults that could not be looked for, and why."""
    unknown = not run.degrees.dp_shard_is_known and not _splits_permuted_heads(run)
    if "CKPT001" in run.faults and run.permuted_heads is not None and unknown:
        return (f"CKPT001: {SHARDS_ARE_UNKNOWN}",)
    return ()


def _trains_wrong(run: Run) -> str:
    """Return what is said of most of them: the run's degrees in words."""
    degrees = run.degrees
    named = {FLAGS[axis]: getattr(degrees, axis) for axis in ("tp", "ep", "cp", "dp_replicate", "dp_shard")}
    named[PIPELINE_FLAG] = run.pipeline.degree
    told = [f"{name} {degree}" for name, degree in named.items() if degree > 1]
    return f"the installed torchtitan trains this model wrong at {', '.join(told) or 'any degree'}"


def _holders(run: Run) -> int:
    """Return over how many ranks the rows of a weight are split, as far as that is known."""
    return run.degrees.tp * run.degrees.dp_shard * run.degrees.cp


def _splits_permuted_heads(run: Run) -> bool:
    return run.permuted_heads is not None and run.permuted_heads % _holders(run) != 0


def _splits_heads(run: Run) -> str:
    """Return over how many ranks a run splits heads that are permuted."""
    heads, ranks = run.permuted_heads, _holders(run)
    return f"Hugging Face weights of {heads} key-value heads are split over {ranks} ranks"


def _splits_experts_over_tp(run: Run) -> bool:
    return run.degrees.tp > 1 and (run.degrees.ep == 1 or run.degrees.etp > 1)


def _one_at_a_time(run: Run) -> bool:
    degrees = run.degrees
    cuts_tokens = degrees.tp > 1 and degrees.ep == 1 and degrees.sequence_parallel and run.has_experts
    return run.rows_at_a_time == 1 and (cuts_tokens or (degrees.cp > 1 and run.full_dtensor))


def _passes_rows_on(run: Run) -> bool:
    """Return whether stages send parts of several sequences, which lie in another order than their gradients.

    Two stages do so where the first changes what the embedding hands on; of more, those in the middle do.
    """
    pipeline, degrees = run.pipeline, run.degrees
    cuts_rows = pipeline.degree > 1 and degrees.tp > 1 and degrees.sequence_parallel
    return cuts_rows and (run.rows_at_a_time or 1) > 1 and (run.changes_embedding or stages(run) != 2)


def _loses_gradients(run: Run) -> bool:
    """Return whether the gradients of weights are looked for when FSDP has put shards in their place."""
    degrees = run.degrees
    has_fsdp = run.line is not Line.TORCHTITAN_0_2 or degrees.dp_shard * degrees.cp > 1 or degrees.ep > 1
    return splits_backward(run) and run.shards_before_backward and has_fsdp


def _shards_no_weight(run: Run) -> bool:
    degrees = run.degrees
    return degrees.tp * degrees.dp_shard * degrees.cp == 1 and degrees.dp_shard_is_known


def _is_ddp(run: Run) -> bool:
    degrees = run.degrees
    return degrees.dp_replicate > 1 and degrees.dp_shard * degrees.cp == 1 and degrees.dp_shard_is_known


_TOLD: dict[str, Callable[[Run], str]] = {
    "CKPT001": _splits_heads,
    "CKPT005": lambda run: "Hugging Face weights of experts are to be saved after the last step",
    "NUM016": lambda run: "the model's embedding and output are tied, and nothing shards them",
    "CKPT006": lambda run: "the optimizer of a vision encoder is to be saved, and the data has no images",
}
"""Code -> what is said of a run that suffers from it, where that is not that it trains wrong."""

_SHOWS: dict[str, Callable[[Run], bool]] = {
    "NUM001": _splits_experts_over_tp,
    "NUM002": lambda run: run.degrees.tp > 1 and run.degrees.ep > 1 and run.degrees.etp == 1,
    "NUM003": lambda run: run.degrees.ep > 1 and run.degrees.etp > 1,
    "NUM004": lambda run: run.degrees.tp > 1 and run.degrees.ep == 1,
    "NUM005": lambda run: run.degrees.tp > 1,
    "NUM006": _one_at_a_time,
    "NUM007": lambda run: True,
    "NUM008": lambda run: run.pipeline.degree > 1,
    "NUM009": _is_ddp,
    "NUM010": lambda run: True,
    "NUM011": lambda run: True,
    "CKPT001": _splits_permuted_heads,
    "CKPT005": lambda run: run.has_experts,
    "CKPT006": lambda run: True,
    "NUM014": _passes_rows_on,
    "NUM015": _loses_gradients,
    "NUM016": _shards_no_weight,
}
"""Code -> whether a run of a model that has the fault is in a layout that shows it."""
