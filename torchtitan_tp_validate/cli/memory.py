"""What a rank would hold of a run that fits: the bytes per rank of audit and table, as `layouts` has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchtitan_tp_validate.cli.verdicts import Judgement, Report
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import Problem, RehearsalError, RunError

MEMORY = "MEMORY"
"""In the place of a rule's code: a rank would hold more than it has."""


def add_memory(parser: Any, *, more: str) -> None:
    """Add the flag, and what a command says of it."""
    from torchtitan_tp_validate.cli.arguments import size

    parser.add_argument(
        "--memory",
        type=size,
        action="once",
        metavar="SIZE",
        help=f"what a rank has, e.g. 80GiB: torchtitan lays {more}; activations come on top",
    )


def check_memory(options: Any) -> None:
    """Complain of a size without the number of ranks that share the model."""
    if options.memory is not None and options.world_size is None:
        options.parser.error("--memory wants --world-size: how many ranks are there?")


def with_memory(
    report: Report,
    options: Any,
    fields: Callable[[Degrees], Mapping[str, int]],
    arguments: Sequence[str] = (),
    **job: Any,
) -> Report:
    """Return a report with what the fullest rank holds where it fits, which then fits the memory too.

    Args:
        report: on a run or a flavor.
        options: the command's: the number of ranks, the memory of each, KV-head replication.
        fields: what a choice of degrees changes in the job, by field under ``[parallelism]``.
        arguments: torchtitan's own, of the run; or else its model and flavor, see `layout_meter`.
        job: more of that.
    """
    if options.memory is None or not any(one.error is None and one.in_world for one in report.judgements):
        return report
    from torchtitan_tp_validate.rehearsal.memory import layout_meter

    judgements: list[Judgement] = []
    try:
        with layout_meter(arguments, replicate_kv_heads=options.replicate_kv_heads, **job) as meter:
            for one in report.judgements:
                if one.error is None and one.in_world:
                    state = meter.measure(fields(one.degrees), options.world_size)
                    too_much = _too_much(state.gib, options.memory) if state.total > options.memory else None
                    one = replace(one, state=state, error=too_much)
                judgements.append(one)
    except RehearsalError as error:
        return replace(report, note=f"Not validated: {error}".partition("\n")[0], skipped=False)
    return replace(report, judgements=tuple(judgements))


def _too_much(held: str, memory: int) -> RunError:
    return RunError(
        [
            Problem(
                MEMORY,
                f"the fullest rank holds {held} GiB, and has {memory / 2**30:.2f} GiB",
                "parameters, gradients and optimizer state of a rank fit its memory",
                "a rank runs out of memory, in the first step at the latest.",
                "shard the data over more ranks, or see what fits: tp-validate layouts --memory",
            )
        ]
    )
