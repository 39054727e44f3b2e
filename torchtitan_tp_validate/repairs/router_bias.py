"""NUM010: initialize the bias of gpt-oss's routers in torchtitan 0.2.1 and 0.2.2, with zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("bfb11ccc7e64bd56", "ba932a2b2223b81c")


def patches() -> list[Patch]:
    """Return the patch of the router's ``init_weights``."""
    module = "torchtitan.models.moe.moe"
    return [Patch(module, "TokenChoiceTopKRouter.init_weights", _KNOWN, _with_bias)]


def _with_bias(init_weights: Callable[..., None]) -> Callable[..., None]:
    from torch import nn

    @functools.wraps(init_weights)
    def repaired(self: Any, *args: Any, **kwargs: Any) -> None:
        init_weights(self, *args, **kwargs)
        if self.gate.bias is not None:
            nn.init.zeros_(self.gate.bias)

    return repaired
