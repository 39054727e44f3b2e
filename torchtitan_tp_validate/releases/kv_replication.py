"""Which models KV-head replication can be had with, told by the names of their classes.

So that the engine can ask without torch or torchtitan, and without loading what replicates.
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.models import sharing_kv_heads

_MODELS_0_2 = tuple(f"torchtitan.models.{name}." for name in sharing_kv_heads("0.2"))

_ATTENTIONS_0_3 = (
    "torchtitan.models.common.attention.GQAttention.Config",
    "torchtitan.models.qwen3_5.model.Qwen35Attention.Config",
    "torchtitan.models.gpt_oss.model.Attention.Config",
)
FUSED = "torchtitan.models.common.attention.FusedQKVLinear.Config"
_SEPARATE = "torchtitan.models.common.attention.QKVLinear.Config"
_PLAIN = "torchtitan.models.common.linear.Linear.Config"
CONVERTED = "torchtitan_tp_validate.kv_replication.torchtitan_0_3.KVHeadLinear.Config"


def class_name(value: Any) -> str:
    """The full name of an object's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def supports_args(args: Any) -> bool:
    """Whether these are the model args of a torchtitan 0.2.x model that it can be had with.

    deepseek_v3 has no key-value heads of its own; gpt_oss and the transformers backend shard another way.
    """
    return class_name(args).startswith(_MODELS_0_2)


def problem_with_attention(attention: Any) -> str | None:
    """What stands in the way in one layer's attention config of torchtitan 0.3.x, or None.

    Float8, MX and LoRA converters, and the dist-GEMM backend, put other classes in the place of the plain
    projections.
    """
    for name, projection in projections(attention).items():
        if class_name(projection) not in (_PLAIN, CONVERTED):
            return f"its {name} is a {class_name(projection)}, not a plain Linear"
    qkv = getattr(attention, "qkv_linear", None)
    if qkv is not None and class_name(qkv) not in (FUSED, _SEPARATE):
        return f"its qkv_linear is a {class_name(qkv)}"
    if class_name(attention) not in _ATTENTIONS_0_3:
        return f"its attention is a {class_name(attention)}"
    return None


def projections(attention: Any) -> dict[str, Any]:
    """Name -> config of what computes keys and values in an attention config of torchtitan 0.3.x."""
    holder = getattr(attention, "qkv_linear", attention)
    names = ("wk", "wv", "wkv", "wqkv")
    return {name: getattr(holder, name) for name in names if hasattr(holder, name)}
