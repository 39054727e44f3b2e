"""The jobs of torchtitan's transformers backend, whose model is a Hugging Face config, made small.

Source: ``experiments/transformers_modeling_backend`` of torchtitan 0.2.2 and 0.3.0.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.shrink import same_remainders, shrink

_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size")
_LAYERS = "num_hidden_layers"
_FEW_LAYERS = 4
"""Of most models these have one of each kind."""


def is_job(model_config: Any) -> bool:
    """Return whether a model is of the transformers backend."""
    return hasattr(model_config, "_tt_to_hf_attribute_map")


def make_small(model_config: Any, model_id: str, degrees: Degrees, least_layers: int, folder: Path) -> str:
    """Write a small copy of the Hugging Face config into a folder; return what names it in place of its own.

    Args:
        model_config: the bridging config, whose own sizes have the last word: they are made small too.
        model_id: of the Hub, or a folder.
        degrees: of the rehearsal.
        least_layers: how many layers there must be.
        folder: to write into.

    Raises:
        RehearsalError: the Hugging Face config cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RehearsalError(f"the Hugging Face config of {model_id!r} cannot be read: {reason}") from error
    text = getattr(config, "text_config", config)
    if not getattr(text, "head_dim", None):
        text.head_dim = text.hidden_size // text.num_attention_heads
    own = model_config._titan_injected_model_args
    if "n_layers" in own:
        # 0.2.x has all sizes of the flavor there, under torchtitan's names.
        args = {name: size for name, size in own.items() if size is not None or name == "ffn_dim_multiplier"}
        own.update(vars(shrink(SimpleNamespace(**args), degrees, least_layers=least_layers)))
    sizes: dict[str, int] = {}
    for name in (*_WIDTHS, _LAYERS):
        size = own.get(name) or getattr(text, name, None)
        if size is not None:
            sizes[name] = size
    small = {name: same_remainders(size, degrees) for name, size in sizes.items() if name in _WIDTHS}
    kinds = list(getattr(text, "layer_types", None) or ())
    kept = max(least_layers, _FEW_LAYERS, *(kinds.index(kind) + 1 for kind in {*kinds}))
    small[_LAYERS] = min(sizes[_LAYERS], kept)
    if kinds:
        text.layer_types = kinds[: small[_LAYERS]]
    for name, value in small.items():
        setattr(text, name, value)
        setattr(model_config, name, value)
        if name in own:
            own[name] = value
    config.save_pretrained(folder)
    return str(folder)
