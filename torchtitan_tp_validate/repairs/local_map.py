"""NUM006: keep the gradient of what torch's ``local_map`` waits for (pytorch #151240).

It hands a function the plain tensors of its arguments. One that a collective is still filling it waits for,
by a method that autograd does not see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("131143533a4b57b3",)


def patches() -> list[Patch]:
    """Return the patch of the method that waits."""
    module = "torch.distributed._functional_collectives"
    return [Patch(module, "AsyncCollectiveTensor.wait", _KNOWN, _differentiable)]


def _differentiable(wait: Callable[[Any], Any]) -> Callable[[Any], Any]:
    import torch

    class Wait(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, tensor: Any) -> Any:
            waited = wait(tensor)
            return waited.view_as(waited)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient

    @functools.wraps(wait)
    def repaired(self: Any) -> Any:
        return Wait.apply(self) if self.requires_grad and torch.is_grad_enabled() else wait(self)

    return repaired
