"""CKPT001: let Llama 3's Hugging Face adapter permute heads whose rows several ranks hold parts of.

It looks at the rows of a weight as heads, which DTensor refuses where a rank has a part of one. Upstream
permutes the whole weight, and splits it again, since #4797 (2026-09).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = {"_permute": ("9651fd6a15246a79",), "_reverse_permute": ("f37b0f957a95dbe6",)}
"""Method -> digest of its source, the same from 0.2.0 on."""


def patches() -> list[Patch]:
    """Return the patches of both directions."""
    package = "torchtitan.models.llama3"
    is_0_3 = find_spec(f"{package}.state_dict_adapter") is not None
    module = f"{package}.state_dict_adapter" if is_0_3 else f"{package}.model.state_dict_adapter"
    return [
        Patch(module, f"Llama3StateDictAdapter.{name}", known, _of_whole_weights)
        for name, known in _KNOWN.items()
    ]


def _of_whole_weights(permute: Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.tensor import DTensor, distribute_tensor

    @functools.wraps(permute)
    def repaired(self: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(w, DTensor):
            return permute(self, w, *args, **kwargs)
        whole = permute(self, w.full_tensor(), *args, **kwargs)
        # Every rank has the whole: nothing is sent.
        return distribute_tensor(whole, w.device_mesh, w.placements, src_data_rank=None)

    return repaired
