"""NUM007: leave the frozen weights under LoRA frozen on spmd_types.

Parallelizing a module makes its parameters anew, and a new parameter wants a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("f3b9cda7467b9a65",)


def patches() -> list[Patch]:
    """Return the patch of the method that makes parameters anew."""
    return [Patch("torchtitan.protocols.module", "Module._spmd_distribute_state", _KNOWN, _as_before)]


def _as_before(distribute: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(distribute)
    def repaired(
        self: Any, parallel_dims: Any, name: str, tensor: Any, layout: Any, *, is_param: bool
    ) -> None:
        wants_gradient = tensor.requires_grad
        distribute(self, parallel_dims, name, tensor, layout, is_param=is_param)
        if is_param:
            self._parameters[name].requires_grad_(wants_gradient)

    return repaired
