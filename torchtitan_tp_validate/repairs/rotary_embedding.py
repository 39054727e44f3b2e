"""NUM011: compute the rotary frequencies of torchtitan's transformers backend with transformers 5.

torchtitan builds the model on meta, where a rotary embedding computes nothing, and asks it later for the
function that does, under a name that transformers 5 no longer has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("fce1953cbf0c55bc",)


def patches() -> list[Patch]:
    """Return the patch of the model's ``init_states``."""
    module = "torchtitan.experiments.transformers_modeling_backend.model"
    return [Patch(module, "HFTransformerModel.init_states", _KNOWN, _with_frequencies)]


def _with_frequencies(init_states: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_states)
    def repaired(self: Any, *args: Any, **kwargs: Any) -> None:
        init_states(self, *args, **kwargs)
        for module in self.model.modules():
            if hasattr(module, "inv_freq") and not hasattr(module, "rope_init_fn"):
                _compute(module)

    return repaired


def _compute(rotary: Any) -> None:
    """Fill the frequencies of a rotary embedding, as its own class would."""
    import torch
    from torch.distributed.tensor import DTensor

    with torch.device(rotary.inv_freq.device):
        fresh = type(rotary)(rotary.config)
    for name in ("inv_freq", "original_inv_freq"):
        buffer = getattr(rotary, name, None)
        if isinstance(buffer, DTensor):
            # Main replicates it under TP.
            buffer = buffer.to_local()
        if buffer is not None:
            buffer.copy_(getattr(fresh, name).to(buffer.dtype))
    rotary.attention_scaling = fresh.attention_scaling
