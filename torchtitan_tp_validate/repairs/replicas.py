"""Stop a run whose copies of a parameter drift apart, whatever the fault behind it.

A parameter that an axis of the mesh replicates has a copy on each of its ranks. The copies start equal and
get equal gradients, so that they stay equal to the last bit; where a gradient is not reduced, they do not,
and the loss says nothing. Every so many steps a checksum of each copy is compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torchtitan_tp_validate.errors import ReplicaError
from torchtitan_tp_validate.repairs.patching import Patch

_CHUNK = 2**24
"""Elements that are summed at a time: as 64-bit numbers they need several times the memory of the weight."""
_WEIGHTS = 8191


def check_every(steps: int) -> None:
    """Have every optimizer of torchtitan compare its model's copies after each so many steps, until undone.

    Raises:
        ReplicaError: the copies differ. Not now, but by the step.
    """
    mend = functools.partial(_checking, steps=steps)
    Patch("torchtitan.components.optimizer", "OptimizersContainer.step", (), mend).apply()


def _checking(step: Callable[..., Any], steps: int) -> Callable[..., Any]:
    count = 0

    @functools.wraps(step)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = step(self, *args, **kwargs)
        count += 1
        if count % steps == 0:
            for model in self.model_parts:
                check_replicas(model, count)
        return result

    return checked


def check_replicas(model: Any, step: int) -> None:
    """Compare the copies of every parameter of a model, across the ranks of each axis that replicates it.

    Collective: a call on every rank, two small reductions for each such axis.

    Args:
        model: whose parameters are DTensors where they are laid out over ranks.
        step: of the optimizer, for the text.

    Raises:
        ReplicaError: the copies of a parameter differ, on every rank that has one of them.
    """
    import torch
    import torch.distributed as dist

    for group, axis, named in _replicated(model):
        sums = torch.stack([_checksum(local) for _, local in named])
        most, least = sums.clone(), sums.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        dist.all_reduce(least, dist.ReduceOp.MIN, group)
        differ = (most != least).nonzero().flatten().tolist()
        if differ:
            first = differ[0]
            every = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
            dist.all_gather(every, sums, group)
            values = [int(one[first]) for one in every]
            odd = min(range(len(values)), key=lambda rank: (values.count(values[rank]), -rank))
            more = f" and of {len(differ) - 1} more" if len(differ) > 1 else ""
            raise ReplicaError(
                f"The copies of {named[first][0]}{more} on the {len(values)} ranks of the {axis} axis are no "
                f"longer equal after step {step}: rank {dist.get_global_rank(group, odd)} has another. A "
                "gradient of it is not reduced over that axis, and the run trains silently wrong. "
                "`tp-validate rehearse` says which fault it may be."
            )


def _replicated(model: Any) -> Iterator[tuple[Any, str, list[tuple[str, Any]]]]:
    """Yield ``(group, axis, [(name, local copy)])`` of each axis that replicates parameters."""
    from torch.distributed.tensor import DTensor

    found: dict[str, tuple[Any, str, list[tuple[str, Any]]]] = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        for dim, placement in enumerate(parameter.placements):
            if placement.is_replicate() and mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                axis = (mesh.mesh_dim_names or ())[dim] if mesh.mesh_dim_names else str(dim)
                local = parameter.to_local().detach()
                found.setdefault(group.group_name, (group, axis, []))[2].append((name, local))
    yield from found.values()


def _checksum(tensor: Any) -> Any:
    """Return a number that two copies share exactly when they are most likely equal to the last bit."""
    import torch

    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(width).flatten()
    # Weighted by place, so that copies whose values have changed places differ too.
    weights = torch.arange(min(bits.numel(), _CHUNK), device=bits.device) % _WEIGHTS + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        total = total * _WEIGHTS + (chunk * weights[: chunk.numel()]).sum()
    return total
