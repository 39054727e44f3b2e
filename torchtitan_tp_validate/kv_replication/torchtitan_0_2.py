"""KV-head replication in torchtitan 0.2.x: wk and wv become gathering linears, just before they are sharded.

Stock ``ColwiseParallel`` then splits their weight by rows over all ranks, as it does with every linear, those
that float8 and MX have put in their place included: torchtitan looks for "float8" among its converters, which
are called "quantize.linear.float8", and so never applies torchao's ``Float8ColwiseParallel``.

Source: ``models/{llama3,llama4,qwen3}/infra/parallelize.py`` and ``model/model.py`` of torchtitan 0.2.0 to
0.2.2, and their ``components/quantization``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

from torchtitan_tp_validate.kv_replication import transformers_backend
from torchtitan_tp_validate.kv_replication.gather import SharesKVHeads
from torchtitan_tp_validate.models import sharing_kv_heads
from torchtitan_tp_validate.releases.base import RequestedModel
from torchtitan_tp_validate.releases.kv_replication import (
    bridging_config,
    class_name,
    raise_if_foreign,
    raise_if_untried,
    shares_linear,
    supports_args,
    unsupported_error,
)

_SHOWN_WITH_CP = ("llama3", "llama4")
"""The attention of a CPU, which is no ring, computes no other model of 0.2.x under CP, stock or not."""


@functools.cache
def _sharing(kind: Any) -> Any:
    """Return the class of a linear like this one whose heads several ranks can share."""
    plain = {"_multiply": staticmethod(F.linear)} if kind is nn.Linear else {}
    return type(f"KVHead{kind.__name__}", (SharesKVHeads, kind), plain)


def put_into_job(job: Any) -> None:
    """Refuse what a ``JobConfig`` asks for beside replication; its model is changed when it is parallelized.

    Raises:
        KVReplicationError: weights that are gathered in float8, async tensor parallelism, or context
            parallelism of a model that a CPU cannot show it with.
    """
    _raise_if_unsupported(job, job.parallelism.data_parallel_shard_degree)


def _raise_if_unsupported(job: Any, dp_shard: int) -> None:
    """See `put_into_job`; dp_shard may be -1, what is left of the ranks, which torchtitan then tells."""
    cp = job.parallelism.context_parallel_degree
    in_float8 = job.quantize.linear.float8.enable_fsdp_float8_all_gather
    # FSDP shards over both.
    if in_float8 and max(dp_shard, cp) > 1 and "quantize.linear.float8" in job.model.converters:
        raise unsupported_error(
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true has FSDP leave wk and wv in float8, "
            "each rank's rows by a scale of its own, and a head has rows of several ranks",
            "enable_fsdp_float8_all_gather = false",
        )
    raise_if_untried(job.parallelism, job.compile)
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
    _raise_if_unsupported(arguments["job_config"], arguments["parallel_dims"].dp_shard)
    config = bridging_config(arguments["model"])
    if config is not None:
        transformers_backend.replicate_kv_heads(arguments["model"], config, tp, _sharing(nn.Linear))
    else:
        replicate_kv_heads(arguments["model"], tp)


def replicate_kv_heads(model: nn.Module, tp: int) -> None:
    """Let the ranks of a TP axis share key-value heads, if there are more of them than heads.

    Args:
        model: a model, or a pipeline stage of it, that nothing has sharded yet. Changed in place.
        tp: tensor parallel degree, compatible with the model under replication.

    Raises:
        KVReplicationError: it is another family's, or wk or wv is no linear of torch, float8 or MX.
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
            if not shares_linear(projection):
                raise unsupported_error(
                    f"layers.{index}.attention.{name} is a {class_name(projection)}",
                    "torch.nn.Linear, float8 or MX",
                )
            projection.n_kv_heads = attention.n_kv_heads
            kind = _sharing(type(projection))  # type: ignore[arg-type]  # a class is hashable
            projection.__class__ = kind
        # 0.2.0 and 0.2.1 repeat each head of a rank so often, and here it has one; 0.2.2 does not ask.
        attention.n_rep = attention.n_heads // tp
