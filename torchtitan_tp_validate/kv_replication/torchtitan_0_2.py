"""KV-head replication in torchtitan 0.2.x: wk and wv become gathering linears, just before they are sharded.

Stock ``ColwiseParallel`` then splits their weight by rows over all ranks, as it does with every linear.

Source: ``models/{llama3,llama4,qwen3}/infra/parallelize.py`` and ``model/model.py`` of torchtitan 0.2.0 to
0.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan_tp_validate.kv_replication.gather import replicated_linear
from torchtitan_tp_validate.models import sharing_kv_heads
from torchtitan_tp_validate.releases.base import RequestedModel
from torchtitan_tp_validate.releases.kv_replication import (
    class_name,
    raise_if_foreign,
    raise_if_untried,
    supports_args,
    unsupported_error,
)

_SHOWN_WITH_CP = ("llama3", "llama4")
"""The attention of a CPU, which is no ring, computes no other model of 0.2.x under CP, stock or not."""


class KVHeadLinear(nn.Linear):  # type: ignore[misc]
    """wk or wv where several ranks share a head; the parameter is that of the linear that it replaces."""

    def __init__(self, replaced: nn.Linear, n_kv_heads: int) -> None:
        super().__init__(replaced.in_features, replaced.out_features, bias=False, device="meta")
        self.weight = replaced.weight
        self.n_kv_heads = n_kv_heads

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """One head of keys or values on each rank of the TP axis."""
        if not isinstance(self.weight, DTensor):
            return super().forward(input)
        return replicated_linear(input, self.weight, None, n_kv_heads=self.n_kv_heads)


def put_into_job(job: Any) -> None:
    """Refuse what a ``JobConfig`` asks for beside replication; its model is changed when it is parallelized.

    Raises:
        KVReplicationError: float8 or MX linears, async tensor parallelism, or context parallelism of a model
            that a CPU cannot show it with.
    """
    linears = [name for name in job.model.converters if name.startswith("quantize.linear.")]
    if linears:
        raise unsupported_error(
            f'model.converters has "{linears[0]}", which replaces wk and wv', "high-precision linears"
        )
    raise_if_untried(job.parallelism, job.compile)
    cp = job.parallelism.context_parallel_degree
    if cp > 1 and job.model.name not in _SHOWN_WITH_CP:
        raise unsupported_error(
            f"parallelism.context_parallel_degree = {cp} was shown to train what one process trains with "
            f"{' and '.join(_SHOWN_WITH_CP)} alone, and the model is {job.model.name}",
            "context_parallel_degree = 1",
            otherwise="has nobody's word that it trains right",
        )


def accept(model: RequestedModel, job: Any) -> None:
    """Let a job start that fits its degrees; see `releases.base.KVReplication`."""
    raise_if_foreign(model.parallelize_fn)
    del job


def put_into_call(function: Callable[..., Any], arguments: Mapping[str, Any], tp: int) -> None:
    """Put it into the model of a parallelize call; see `releases.base.KVReplication`."""
    raise_if_foreign(function)
    put_into_job(arguments["job_config"])
    replicate_kv_heads(arguments["model"], tp)


def replicate_kv_heads(model: nn.Module, tp: int) -> None:
    """Let the ranks of a TP axis share key-value heads, if there are more of them than heads.

    Args:
        model: a model, or a pipeline stage of it, that nothing has sharded yet. Changed in place.
        tp: tensor parallel degree, compatible with the model under replication.

    Raises:
        KVReplicationError: wk or wv is not a plain linear.
    """
    if not supports_args(model.model_args):
        *most, last = sharing_kv_heads("0.2")
        raise unsupported_error(
            f"{class_name(model)} is not one of {', '.join(most)} and {last}", "those models"
        )
    for index, layer in model.layers.items():
        attention = layer.attention
        if attention.n_kv_heads % tp == 0:
            continue
        for name in ("wk", "wv"):
            projection = getattr(attention, name)
            if type(projection) is not nn.Linear or projection.bias is not None:
                raise unsupported_error(
                    f"layers.{index}.attention.{name} is a {class_name(projection)}",
                    "torch.nn.Linear without a bias",
                )
            setattr(attention, name, KVHeadLinear(projection, attention.n_kv_heads))
        # 0.2.0 and 0.2.1 repeat each head of a rank so often, and here it has one; 0.2.2 does not ask.
        attention.n_rep = attention.n_heads // tp
