"""CKPT005: have the Hugging Face adapters of Llama 4 and Qwen3.5 give what safetensors can write.

They transpose the weights of experts, which leaves these as they lie in memory; safetensors wants them in
order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_ADAPTERS = {
    "torchtitan.models.llama4": ("model.state_dict_adapter", "Llama4StateDictAdapter"),
    "torchtitan.models.qwen3_5": ("state_dict_adapter", "Qwen35StateDictAdapter"),
}
_KNOWN = ("beca1ffa6bc534d2", "d268f78dcbcfb4e8", "99d4163bbdc55f81")


def patches() -> list[Patch]:
    """Return the patch of the ``to_hf`` of each of the two that there is."""
    return [
        Patch(f"{package}.{module}", f"{adapter}.to_hf", _KNOWN, _in_order)
        for package, (module, adapter) in _ADAPTERS.items()
        if find_spec(package) is not None
    ]


def _in_order(to_hf: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(to_hf)
    def repaired(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name: weight.contiguous() for name, weight in to_hf(self, state_dict).items()}

    return repaired
