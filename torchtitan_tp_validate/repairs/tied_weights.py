"""NUM016: tie Qwen3's embedding and head again in torchtitan 0.2.0 and 0.2.1, before they are initialized.

`torch.nn.Module.to_empty` gives each module a parameter of its own, unless it is a DTensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("6c6cd62d56c289ae", "2543f624ab785410")


def patches() -> list[Patch]:
    """Return the patch of the model's ``init_weights``."""
    return [Patch("torchtitan.models.qwen3.model.model", "Qwen3Model.init_weights", _KNOWN, _tying)]


def _tying(init_weights: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_weights)
    def repaired(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.model_args.enable_weight_tying:
            self.output.weight = self.tok_embeddings.weight
        init_weights(self, *args, **kwargs)

    return repaired
