"""The projection of one rank's own key-value head, from a weight that is sharded over all ranks.

The weight is small beside the activations: it is gathered over the TP axis, the rows of the other heads are
dropped, and what is left is multiplied, by the linear as it is otherwise, in whatever precision. In backward
the gradient of the kept rows is reduce-scattered, which sums over the ranks that share a head and leaves
every rank with the gradient of its shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
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


class SharesKVHeads:
    """What wk or wv does where several ranks share its heads; mixed into the linear that it is otherwise."""

    n_kv_heads: int
    weight: Any
    bias: Any
    _parameters: dict[str, Any]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Keys or values of shape (batch, seq_len, heads * head_dim), of DTensors a head on each rank."""
        if not isinstance(self.weight, DTensor) or self.n_kv_heads % _tp(self.weight.device_mesh) == 0:
            return super().forward(input)  # type: ignore[misc]  # of the linear
        assert isinstance(input, DTensor)
        share = partial(_head_for_each_rank, x_placements=input.placements, n_kv_heads=self.n_kv_heads)
        return self._multiply(input, share(self.weight), None if self.bias is None else share(self.bias))

    def _multiply(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Do what the linear does with a weight that is not its own."""
        own = dict(self._parameters)
        self._parameters.update(weight=weight, bias=bias)
        try:
            return super().forward(input)  # type: ignore[misc]
        finally:
            self._parameters.update(own)


def _tp(mesh: DeviceMesh) -> int:
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(TP_AXIS)) if TP_AXIS in names else 1


def _head_for_each_rank(part: DTensor, x_placements: Sequence[Placement], n_kv_heads: int) -> DTensor:
    """Return the weight, or the bias, of as many heads as ranks, copies of ``n_kv_heads``, one on each rank.

    What multiplies by it is stock's, whatever its precision, and its gradients too.

    Args:
        part: rows split over the TP axis, replicated over the others of its mesh.
        x_placements: of what is multiplied by it, over the same mesh.
        n_kv_heads: heads of the part.
    """
    mesh = part.device_mesh
    axis = (mesh.mesh_dim_names or ()).index(TP_AXIS)
    # Where x is split, each rank's gradient is of its own part of x.
    gradients = [
        Shard(0) if position == axis else Partial() if placement.is_shard() else Replicate()
        for position, placement in enumerate(x_placements)
    ]
    whole = all_gather_tensor_autograd(part.to_local(grad_placements=gradients), 0, (mesh, axis))
    own = rows_of_own_head(
        whole, n_kv_heads=n_kv_heads, tp=mesh.size(axis), tp_rank=mesh.get_local_rank(axis)
    )
    # An older torch, with which torchtitan 0.2.x has this one axis, cannot be told.
    told = {} if mesh.ndim == 1 else {"grad_placements": gradients}
    return DTensor.from_local(own, mesh, part.placements, run_check=False, **told)
