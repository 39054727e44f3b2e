"""KV-head replication in torchtitan's transformers backend: k_proj and v_proj of the built model gather.

They do before the model is sharded. Either line of torchtitan then splits their weights by rows over all
ranks, as it does with every linear.

Source: ``experiments/transformers_modeling_backend`` of torchtitan 0.2.2 (``infra/parallelize.py``) and 0.3.0
(``hf_sharding.py``, ``module_conversion.py``), ``repeat_kv`` of transformers 5.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from torchtitan_tp_validate.releases.kv_replication import class_name, unsupported_error


def replicate_kv_heads(model: Any, config: Any, tp: int, sharing: type) -> None:
    """Let the ranks of a TP axis share key-value heads, if there are more of them than heads.

    Args:
        model: a model, or a pipeline stage of it, that nothing has sharded yet. Changed in place.
        config: the bridging config of it.
        tp: tensor parallel degree, compatible with the model under replication.
        sharing: the line's linear whose heads several ranks can share.

    Raises:
        KVReplicationError: an attention is not made of a k_proj and a v_proj of whole heads.
    """
    n_kv_heads = config.n_kv_heads or config.n_heads
    if n_kv_heads % tp == 0:
        return
    for layer in model.layers:
        attention = layer.self_attn
        for name in ("k_proj", "v_proj"):
            projection: Any = getattr(attention, name, None)
            if type(projection) is not nn.Linear:
                raise unsupported_error(
                    f"{type(attention).__qualname__}.{name} is a {class_name(projection)}", "torch.nn.Linear"
                )
            projection.n_kv_heads = n_kv_heads
            projection.__class__ = sharing
        # Of the heads of one rank, where torchtitan 0.2.x has transformers repeat them.
        attention.num_key_value_groups = config.n_heads // tp
