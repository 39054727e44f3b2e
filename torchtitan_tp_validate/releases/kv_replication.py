"""What KV-head replication can be had with: which models, and which runs. All else is refused at startup.

Models are told by the names of their classes, so that the engine can ask without torch or torchtitan, and
without loading what replicates.
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.errors import KVReplicationError
from torchtitan_tp_validate.models import is_listed, sharing_kv_heads

_LINEARS_0_2 = (
    "torch.nn.modules.linear.Linear",
    "torchao.float8.float8_linear.Float8Linear",
    "torchao.prototype.mx_formats.mx_linear.MXLinear",
)
_MODELS_0_2 = tuple(f"torchtitan.models.{name}." for name in sharing_kv_heads("0.2"))

_ATTENTIONS_0_3 = (
    "torchtitan.models.common.attention.GQAttention.Config",
    "torchtitan.models.qwen3_5.model.Qwen35Attention.Config",
    "torchtitan.models.gpt_oss.model.Attention.Config",
    "torchtitan.models.muse_glimmer.model.Attention.Config",
)
FUSED = "torchtitan.models.common.attention.FusedQKVLinear.Config"
_SEPARATE = "torchtitan.models.common.attention.QKVLinear.Config"
_LINEARS = (
    "torchtitan.models.common.linear.Linear.Config",
    "torchtitan.components.quantization.float8.Float8Linear.Config",
    "torchtitan.components.quantization.mx.MXFP8Linear.Config",
)
_LORA = "torchtitan.components.lora"
_OWN = ("torchtitan.models.", "torchtitan.experiments.transformers_modeling_backend.")
"""Where torchtitan parallelizes models as it does here; what else is in its experiments are copies."""


def class_name(value: Any) -> str:
    """Return the full name of an object's class; where LoRA extends or freezes one, that of the one."""
    kind = next(kind for kind in type(value).__mro__ if kind.__module__ != _LORA)
    return f"{kind.__module__}.{kind.__qualname__}"


def bridging_config(model_or_config: Any) -> Any | None:
    """Return the config of the transformers backend's ``HFTransformerModel``, or it, or None for neither."""
    inner = getattr(model_or_config, "model", None)
    config = getattr(inner, "config", model_or_config)
    return config if hasattr(config, "_tt_to_hf_attribute_map") else None


def supports_args(args: Any) -> bool:
    """Return whether these are the model args of a torchtitan 0.2.x model that it can be had with.

    deepseek_v3 has no key-value heads of its own, gpt_oss shards another way, and the transformers backend's
    are no such args (`bridging_config`).
    """
    return class_name(args).startswith(_MODELS_0_2)


def shares_linear(projection: Any) -> bool:
    """Return whether ranks can share the heads of this wk or wv of a torchtitan 0.2.x model."""
    return class_name(projection) in _LINEARS_0_2


def problem_with_attention(attention: Any) -> str | None:
    """Return what stands in the way in one layer's attention config of torchtitan 0.3.x, or None.

    NVFP4 converters and the dist-GEMM backend put other classes in the place of the projections.
    """
    for name, projection in projections(attention).items():
        if name == "wqkv" and hasattr(projection, "rank"):
            return "its wqkv has one LoRA adapter, where three projections would have three: another model"
        if not hasattr(projection, "n_kv_heads") and class_name(projection) not in _LINEARS:
            return f"its {name} is a {class_name(projection)}"
    qkv = getattr(attention, "qkv_linear", None)
    if qkv is not None and class_name(qkv) not in (FUSED, _SEPARATE):
        return f"its qkv_linear is a {class_name(qkv)}"
    if class_name(attention) not in _ATTENTIONS_0_3:
        return f"its attention is a {class_name(attention)}"
    return None


def what_works() -> str:
    """Return in which models of torchtitan 0.3.x it can be had."""
    *most, last = sharing_kv_heads("0.3")
    return (
        "separate wq, wk and wv (or ReplicateKVHeads before LoRAConverter), plain, float8 or MXFP8, in "
        f"{', '.join(most)} and {last}"
    )


def projections(attention: Any) -> dict[str, Any]:
    """Name -> config of what computes keys and values in an attention config of torchtitan 0.3.x."""
    holder = getattr(attention, "qkv_linear", attention)
    names = ("wk", "wv", "wkv", "wqkv")
    return {name: getattr(holder, name) for name in names if hasattr(holder, name)}


def raise_if_untried(parallelism: Any, compiling: Any) -> None:
    """Refuse what replication was not seen to work with, whatever the model.

    Args:
        parallelism: the run's ``[parallelism]``; in 0.2.x it holds the switch of async TP.
        compiling: the run's ``[compile]``, which holds it in 0.3.x; None where there is none.

    Raises:
        KVReplicationError: asynchronous tensor parallelism, which rewrites the gather before wk and wv, or
            the option of a patched torchtitan (``patches/``), which replicates in another way.
    """
    if getattr(parallelism, "replicate_kv_heads", False):
        raise unsupported_error(
            "parallelism.replicate_kv_heads = true has torchtitan itself share heads",
            "that option alone, without --replicate-kv-heads",
            "would be refused as its model is built, whose wk and wv are no plain linears any more",
        )
    for name, section in (("parallelism", parallelism), ("compile", compiling)):
        if getattr(section, "enable_async_tensor_parallel", False):
            flag = f"{name}.enable_async_tensor_parallel"
            raise unsupported_error(
                f"{flag} = true fuses wk and wv with the gather before them", f"{flag} = false"
            )


def raise_if_foreign(parallelize_fn: Any) -> None:
    """Refuse a model that another function than torchtitan's own parallelizes, or a guard of one.

    Raises:
        KVReplicationError: it belongs to an experiment, or to somebody else.
    """
    module = parallelize_fn.__module__
    if not module.startswith(_OWN) or not is_listed(module):
        raise unsupported_error(f"{module} parallelizes this model", "torchtitan.models")


def unsupported_error(
    what: str, instead: str, otherwise: str = "might die in its first forward pass, or train wrongly"
) -> KVReplicationError:
    """Return the error for a run that asks for replication and for something that it does not go with."""
    return KVReplicationError(
        f"KV-head replication is not supported here: {what}.\n"
        f"Without this check the run {otherwise}.\n"
        f"What works: {instead}, or a tensor parallel degree that divides n_kv_heads without "
        "--replicate-kv-heads."
    )
