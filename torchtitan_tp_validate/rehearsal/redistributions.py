"""Remember what torch finds on the way, as it searches how to redistribute a DTensor."""

from __future__ import annotations

import functools
from typing import Any

_WHAT_IT_GOES_BY = ("strided_shard_placements_in_target", "partial_reduce_ops_in_target")
_KNOWN = {"device_mesh", "dtensor_meta", "tensor_dimension", "cost_function", *_WHAT_IT_GOES_BY}
"""Attributes of a planner: one with others may find something else the next time that it is asked."""


def remember_next_placements() -> None:
    """Have torch's planner compute only once what is one step away from given placements.

    It finds the same paths. But what is cut by CP and by TP has thousands of placements, and a search goes
    through most of them (torch ``distributed/tensor/_redistribute.py``, ``find_min_cost_path``): without this
    the first step takes minutes on ``full_dtensor`` of torchtitan 0.3.x.
    """
    from torch.distributed.tensor import _redistribute

    planner: Any = _redistribute.DTensorRedistributePlanner
    ask = planner.get_next_state

    @functools.wraps(ask)
    def get_next_state(self: Any, placements: Any, order: Any) -> Any:
        if self.__dict__.keys() - {"_found"} != _KNOWN:
            return ask(self, placements, order)
        found: dict[Any, dict[Any, Any]] = self.__dict__.setdefault("_found", {})
        key = (placements, order, *(frozenset(getattr(self, name)) for name in _WHAT_IT_GOES_BY))
        if key not in found:
            found[key] = ask(self, placements, order)
        return dict(found[key])  # the search adds to it

    planner.get_next_state = get_next_state
