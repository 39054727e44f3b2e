"""NUM001 and NUM002: sum what the routers of torchtitan 0.2.x get back over the TP ranks.

A rank goes back through its part of the experts (their hidden dimension is split) or of the tokens (the TP
axis is borrowed for experts), so that what arrives at the router is a part of the gradient. Upstream sums it
since #2416 (de329200b), by placements of DTensor; here it is done by hooks, since the plans are made of
classes that 0.2.x does not have.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.repairs.patching import Patch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KNOWN = {
    "torchtitan.models.llama4.infra.parallelize": ("bd31c2facde33ddb", "70c78171b6fef3eb"),
    "torchtitan.models.gpt_oss.infra.parallelize": ("55a3500558eed49c",),
    "torchtitan.experiments.gpt_oss.infra.parallelize": ("443d4fdd8666d53c",),
}
"""Module -> digests of its ``apply_moe_ep_tp`` in 0.2.0, 0.2.1 and 0.2.2."""


def patches() -> list[Patch]:
    """Return the patches of both functions that lay out experts, as far as they are installed."""
    return [
        Patch(module, "apply_moe_ep_tp", known, _summing, everywhere=True)
        for module, known in _KNOWN.items()
        if _is_installed(module)
    ]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def _summing(apply_moe_ep_tp: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(apply_moe_ep_tp)

    @functools.wraps(apply_moe_ep_tp)
    def repaired(*args: Any, **kwargs: Any) -> None:
        apply_moe_ep_tp(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        tp_mesh = given["tp_mesh"]
        if tp_mesh is None:
            return
        etp = given["etp_enabled"] if "etp_enabled" in given else given["etp_mesh"] is not None
        borrowed = given["ep_mesh"] is not None and not etp
        for block in given["model"].layers.values():
            if block.moe_enabled:
                _hook(block.moe, tp_mesh.get_group(), borrowed)

    return repaired


def _hook(moe: Any, group: ProcessGroup, borrowed: bool) -> None:
    """Have a layer's gradients summed.

    Args:
        moe: the layer, laid out over the TP ranks.
        group: these ranks.
        borrowed: whether they split the tokens of the experts, and not the experts.
    """
    from torchtitan_tp_validate.repairs.gradients import scale_gradient, sum_gradient

    if not borrowed and moe.score_before_experts:
        # The experts' input, scores and all, is summed already.
        return
    moe.router.gate.register_forward_hook(lambda _, __, scores: sum_gradient(scores, group))
    if borrowed:
        # What comes back through the routed tokens is a part, too; through all else it is whole.
        share = 1 / group.size()
        moe.register_forward_pre_hook(lambda _, given: (sum_gradient(given[0], group), *given[1:]))
        for whole in (moe.router, moe.shared_experts):
            if whole is not None:
                whole.register_forward_pre_hook(
                    lambda _, given: (scale_gradient(given[0], share), *given[1:])
                )
