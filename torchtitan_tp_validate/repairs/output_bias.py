"""NUM005: give gpt-oss's output bias all of its gradient on the DTensor backends.

Each TP rank adds its share of the bias to its part of a sum. The gradient that comes back is the whole one on
every rank, and dividing the bias divides it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("dd943c1f3c1d0a0f",)


def patches() -> list[Patch]:
    """Return the patch of ``ScaledBiasRowwiseLinear``."""
    module = "torchtitan.models.common.linear"
    return [Patch(module, "ScaledBiasRowwiseLinear.forward", _KNOWN, _whole_gradient)]


def _whole_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.tensor import DTensor
    from torch.nn import functional

    from torchtitan_tp_validate.repairs.gradients import scale_forward

    @functools.wraps(forward)
    def repaired(self: Any, input: Any) -> Any:
        if not isinstance(self.bias, DTensor):
            # On spmd_types the gradient is summed over the ranks.
            return forward(self, input)
        bias = scale_forward(self.bias.to_local(), 1 / self.tp_degree)
        return functional.linear(input, self.weight.to_local(), bias)

    return repaired
