"""NUM015: gather the weights of a stage before its gradients of inputs and of weights are computed apart.

Both look for the parameters that are in the graph of the forward pass. FSDP puts shards in their place as it
shards a weight again, and gives the same parameters back as it gathers it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("ab025924165aedbe", "1c256f3c41a36e74", "e6040d6fd53ee62b")
"""torch 2.13's, 2.14.1's (compared, not run) and 2.15's."""
_KNOWN_OF_WEIGHTS = ("747d5dd248c5867d",)


def patches() -> list[Patch]:
    """Return the patches of both passes."""
    module, stage = "torch.distributed.pipelining.stage", "_PipelineStageBase"
    return [
        Patch(module, f"{stage}.backward_one_chunk", _KNOWN, _of_inputs),
        Patch(module, f"{stage}.backward_weight_one_chunk", _KNOWN_OF_WEIGHTS, _of_weights),
    ]


def _gather(stage: Any) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in stage.submod.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def _of_inputs(backward_one_chunk: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(backward_one_chunk)
    def repaired(
        self: Any,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        if not full_backward:
            _gather(self)
        backward_one_chunk(self, bwd_chunk_id, loss, full_backward, last_backward)

    return repaired


def _of_weights(backward_weight_one_chunk: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(backward_weight_one_chunk)
    def repaired(self: Any, bwd_chunk_id: int, last_backward: bool = False) -> None:
        _gather(self)
        backward_weight_one_chunk(self, bwd_chunk_id, last_backward)

    return repaired
