"""NUM014: send a gradient to the stage before as that stage has made room for it.

A stage tells the one before how a gradient lies in memory as autograd hands it over. What it sends is an
input's ``.grad``, which lies as the input does, and NCCL sends memory as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("c66de5e9d2f4576d", "f7136ed398c094bd")
"""torch 2.14.1's, and 2.15's, which has another way to name the communicator."""


def patches() -> list[Patch]:
    """Return the patch of the method that a stage sends its gradients by."""
    module = "torch.distributed.pipelining.stage"
    return [Patch(module, "_PipelineStageBase.get_bwd_send_ops", _KNOWN, _as_received)]


def _as_received(get_bwd_send_ops: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    import torch

    @functools.wraps(get_bwd_send_ops)
    def repaired(self: Any, bwd_chunk_id: int) -> list[Any]:
        ops = get_bwd_send_ops(self, bwd_chunk_id)
        room = [
            meta
            for index, stage in enumerate(self.grad_send_info if ops else ())
            if stage is not None and (meta := self._get_grad_send_meta(index)) is not None
        ]
        for op, meta in zip(ops, room, strict=True):
            if op.tensor.stride() != meta.stride:
                op.tensor = torch.empty_strided(
                    meta.shape, meta.stride, dtype=op.tensor.dtype, device=op.tensor.device
                ).copy_(op.tensor)
        return ops

    return repaired
