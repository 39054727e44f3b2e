"""The projection of one rank's own key-value head, from a weight that is sharded over all ranks.

The weight is small beside the activations: it is gathered over the TP axis, the rows of the other heads are
dropped, and what is left is multiplied. In backward the gradient of the kept rows is reduce-scattered,
which sums over the ranks that share a head and leaves every rank with the gradient of its shard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

TP_AXIS = "tp"


def rows_of_own_head(rows: torch.Tensor, *, n_kv_heads: int, tp: int, tp_rank: int) -> torch.Tensor:
    """Return the rows of the head that this rank's query heads attend to.

    Args:
        rows: the whole weight, of shape (n_kv_heads * head_dim, in_features), or the whole bias.
        n_kv_heads: how many heads it has; tp is a multiple of it.
        tp: tensor parallel degree.
        tp_rank: this rank's place on the TP axis. Query heads are dealt out in order, so that the ranks
            of one key-value head are neighbours.
    """
    head_dim = rows.shape[0] // n_kv_heads
    first = tp_rank * n_kv_heads // tp * head_dim
    # Copied: a view would keep the rows of all heads alive until backward.
    return rows[first : first + head_dim].clone()


def replicated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    n_kv_heads: int,
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] = F.linear,
) -> torch.Tensor:
    """Return what a column-wise linear of ``tp`` heads does, from the weight of ``n_kv_heads``: of DTensors.

    Args:
        x: replicated over the TP axis, in any way split over other axes of the same mesh.
        weight: rows split over the TP axis, replicated over the others.
        bias: as weight.
        n_kv_heads: heads of the weight.
        multiply: what makes the product of x, the rows of a head and their bias, all of them local.

    Returns:
        A DTensor of tp heads of features, one on each rank of the TP axis.
    """
    assert isinstance(x, DTensor)
    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    axis = tp_axis(mesh)
    # A rank's part of x gets gradients from its own head alone: the whole is the sum over the TP axis.
    x_gradients = _with_axis(x.placements, axis, Partial())
    local_x = x.to_local(grad_placements=x_gradients)
    local = [
        _own_rows(part, x.placements, axis, n_kv_heads) if part is not None else None
        for part in (weight, bias)
    ]
    assert local[0] is not None
    out = multiply(local_x, local[0], local[1])
    return DTensor.from_local(
        out, mesh, _with_axis(x.placements, axis, Shard(out.dim() - 1)), run_check=False
    )


def tp_axis(mesh: DeviceMesh) -> int:
    """Return the position of the TP axis in a mesh."""
    names: tuple[str, ...] = mesh.mesh_dim_names or ()
    return names.index(TP_AXIS)


def _own_rows(
    part: torch.Tensor, x_placements: tuple[Placement, ...], axis: int, n_kv_heads: int
) -> torch.Tensor:
    assert isinstance(part, DTensor)
    # Where x is split, each rank's gradient is of its own part of x.
    gradients = tuple(
        Shard(0) if position == axis else Partial() if placement.is_shard() else Replicate()
        for position, placement in enumerate(x_placements)
    )
    mesh = part.device_mesh
    whole = all_gather_tensor_autograd(part.to_local(grad_placements=gradients), 0, (mesh, axis))
    return rows_of_own_head(
        whole, n_kv_heads=n_kv_heads, tp=mesh.size(axis), tp_rank=mesh.get_local_rank(axis)
    )


def _with_axis(placements: tuple[Placement, ...], axis: int, placement: Placement) -> tuple[Placement, ...]:
    return (*placements[:axis], placement, *placements[axis + 1 :])
