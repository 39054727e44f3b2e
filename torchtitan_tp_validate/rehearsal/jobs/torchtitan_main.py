"""The jobs of torchtitan's main, made small, and its Trainer on the CPU.

They are those of 0.3.x, but for their batches, which have no dimension of sequences: a microbatch is so many
tokens in a row, and where a sequence begins its positions begin again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torchtitan_tp_validate.rehearsal.jobs import torchtitan_0_3 as line_0_3
from torchtitan_tp_validate.rehearsal.jobs.torchtitan_0_3 import (
    build_on_meta,
    follow_shapes,
    make_plain,
    make_small,
    more_inputs,
    parse,
    prepare,
    vocab_size,
)

__all__ = [
    "build_on_meta",
    "build_trainer",
    "follow_shapes",
    "make_plain",
    "make_small",
    "more_inputs",
    "parse",
    "prepare",
    "vocab_size",
]


def build_trainer(
    job: Any,
    feed: Callable[..., Any],
    local_batch_size: int,
    microbatch_size: int,
    *,
    global_batch_size: int = -1,
) -> Any:
    """Return the job's Trainer; see `jobs`."""

    def in_a_row(*args: Any) -> Iterator[Any]:
        for inputs, labels in feed(*args):
            flat = {name: _flat(value) for name, value in inputs.items()}
            yield flat, labels.flatten()

    return line_0_3.build_trainer(
        job, in_a_row, local_batch_size, microbatch_size, global_batch_size=global_batch_size
    )


def _flat(value: Any) -> Any:
    return value.flatten() if hasattr(value, "flatten") else value
