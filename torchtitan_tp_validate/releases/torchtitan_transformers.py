"""torchtitan's own transformers backend: a Hugging Face config under torchtitan's names.

One set of head counts describes every layer. torchtitan itself never checks them (its config is not a
``Decoder.Config``), in any release.

Source: ``experiments/transformers_modeling_backend`` of torchtitan 0.2.1, 0.2.2 and 0.3.0.
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.plan import Plan, PlanBuilder
from torchtitan_tp_validate.releases import torchtitan_0_2, torchtitan_0_3
from torchtitan_tp_validate.releases.base import Release
from torchtitan_tp_validate.releases.kv_replication import bridging_config
from torchtitan_tp_validate.releases.reading import attention_heads, positive_int, share_kv_heads
from torchtitan_tp_validate.rules import Line

_HOW_TO_REPLICATE = "--replicate-kv-heads, or install(replicate_kv_heads=True)"


find_config = bridging_config


def line_of_config(config: Any) -> Release:
    """Return the line of torchtitan that a bridging config is of."""
    return torchtitan_0_3 if _is_0_3(config) else torchtitan_0_2


def _is_0_3(config: Any) -> bool:
    return hasattr(config, "build")


def read(config: Any, model: Any, degrees: Degrees) -> Plan:
    """Return the plan of ``parallelize_hf_transformers``, which splits q, k and v_proj by columns."""
    del model, degrees
    name = type(config).__qualname__
    model_type = getattr(config, "model_type", "")
    try:
        if not model_type and (config.n_heads is None or config.n_kv_heads is None):
            raise PlanError(
                f"{name} gets its head counts from the Hugging Face model that the job names, "
                "when the model is built."
            )
        heads = attention_heads(config, name)
        n_layers = positive_int(config, "n_layers", name)
        head_dim = getattr(config, "head_dim", None) or getattr(config, "dim", 0) // config.n_heads
    except PlanError:
        raise
    except Exception as error:
        # A Hugging Face config whose layers differ raises when asked for one number for all of them.
        raise PlanError(f"the head counts of {name} cannot be read: {error}") from error
    findings, shared = PlanBuilder(Line.TORCHTITAN_0_2), PlanBuilder(Line.TORCHTITAN_0_2)
    for index in range(n_layers):
        for code, size in heads.items():
            findings.add(code, size, layers=(index,))
    if "TP002" in heads and head_dim:
        share_kv_heads(shared, heads["TP002"], head_dim, range(n_layers))
    return Plan(
        model=model_type or "this model",
        dims=findings.dims(),
        n_layers=n_layers,
        how_to_change=(torchtitan_0_3 if _is_0_3(config) else torchtitan_0_2).HOW_TO_CHANGE,
        shared_kv=shared.dims(),
        how_to_replicate=_HOW_TO_REPLICATE,
    )
