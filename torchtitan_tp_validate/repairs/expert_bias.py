"""NUM003 and NUM004: add the second bias of gpt-oss's experts once, not once per TP rank.

Every TP rank adds the bias to its part of a sum. torchtitan divides it by their number where it finds the TP
axis on the weights' mesh: not with ``expert_tensor_parallel_degree`` (0.2.x), whose axis has another name,
and not on spmd_types (0.3.x), where weights have no mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN_0_2 = ("1801a1caaf65405a",)
_KNOWN_0_3 = ("230f61bb964c5fdf", "73c79fa5c1c7ec17")
"""0.3.0's, and main's of 2026-08, which divides the bias and not its gradient."""


def patches() -> list[Patch]:
    """Return the patch of the line that is installed."""
    if find_spec("torchtitan.models.gpt_oss.moe") is not None:
        return [Patch("torchtitan.models.gpt_oss.moe", "GptOssGroupedExperts.forward", _KNOWN_0_3, _once)]
    return [
        Patch("torchtitan.models.gpt_oss.model.moe", "GptOssGroupedExperts.forward", _KNOWN_0_2, _once_by_etp)
    ]


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torchtitan.distributed.utils import get_spmd_backend
    from torchtitan.models.gpt_oss import moe

    class Scaled:
        """In the place of ``ScaleBiasForward`` on spmd_types, which sums the gradient over the ranks."""

        @staticmethod
        def apply(bias: Any, tp_degree: int, dtype: Any) -> Any:
            ranks = moe.spmd_mesh_size("tp") if moe.spmd_mesh_size("ep") == 1 else 1
            return (bias / ranks).to(dtype) if ranks > 1 else original.apply(bias, tp_degree, dtype)

    original = moe.ScaleBiasForward

    @functools.wraps(forward)
    def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
        if get_spmd_backend() != "spmd_types":
            return forward(self, *args, **kwargs)
        moe.ScaleBiasForward = Scaled
        try:
            return forward(self, *args, **kwargs)
        finally:
            moe.ScaleBiasForward = original

    return repaired


def _once_by_etp(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.tensor import DTensor
    from torchtitan.models.gpt_oss.model import moe

    original = moe.ScaleBiasForward

    @functools.wraps(forward)
    def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self.mlp1_weight
        names = weight.device_mesh.mesh_dim_names if isinstance(weight, DTensor) else ()
        if "etp" not in names:
            return forward(self, *args, **kwargs)
        ranks = weight.device_mesh["etp"].size()

        class ByEtp:
            @staticmethod
            def apply(bias: Any, tp_degree: int) -> Any:
                return original.apply(bias, ranks)

        moe.ScaleBiasForward = ByEtp
        try:
            return forward(self, *args, **kwargs)
        finally:
            moe.ScaleBiasForward = original

    return repaired
