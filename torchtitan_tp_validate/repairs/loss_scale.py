"""NUM008 and NUM009: scale the loss of torchtitan 0.2.2 before it goes back, in pipelines and under DDP.

A pipeline's schedule calls ``backward()`` on the sum over a microbatch, and what it sums is divided
afterwards; DDP averages what the loss has divided by the tokens of all replicas already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("d66c2dd178723d3a",)


def patches() -> list[Patch]:
    """Return the patch of the Trainer's ``forward_backward_step``."""
    return [Patch("torchtitan.train", "Trainer.forward_backward_step", _KNOWN, _scaled)]


def _scaled(forward_backward_step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward_backward_step)
    def repaired(self: Any, *, global_valid_tokens: Any, **batch: Any) -> Any:
        dims = self.parallel_dims
        replicas = dims.dp_replicate if dims.dp_replicate_enabled and not dims.fsdp_enabled else 1
        tokens = global_valid_tokens / replicas
        if not dims.pp_enabled:
            return forward_backward_step(self, global_valid_tokens=tokens, **batch) / replicas
        # What the schedule sums is divided already.
        with _divided_by(tokens, self.pp_schedule):
            return forward_backward_step(self, global_valid_tokens=replicas, **batch)

    return repaired


@contextmanager
def _divided_by(tokens: Any, schedule: Any) -> Iterator[None]:
    """Have the loss of each microbatch divided; validation takes the sum from the same schedule."""
    loss_fn = schedule._loss_fn

    def divided(*args: Any, **kwargs: Any) -> Any:
        return loss_fn(*args, **kwargs) / tokens

    # The stages before the last one have none.
    schedule._loss_fn = divided if loss_fn is not None else None
    try:
        yield
    finally:
        schedule._loss_fn = loss_fn
