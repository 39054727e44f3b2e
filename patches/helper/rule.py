"""The rule, the same for every torchtitan; make_patches.py adds one of the readers."""

import math


def validate_tp_compat(config, tp: int) -> None:
    """
    Check that the tensor parallel degree splits attention into whole heads.

    TP gives every rank an equal share of the q, k and v projections' columns, and
    attention then views that share as heads. A degree that does not divide a head
    count dies in the first forward pass, far from its cause. Only the config is
    read, so every rank comes to the same verdict before any communication.

    Args:
        config: The config (or model args) of the whole model.
        tp (int): The tensor parallel degree.

    Raises:
        ValueError: If the degree does not divide one of the head counts.
    """
    if tp == 1:
        return
    head_counts = _head_counts(config)
    indivisible = [(name, count) for name, count in head_counts if count % tp != 0]
    if indivisible:
        name, count = min(indivisible, key=lambda item: item[1])
        max_tp = math.gcd(*(count for _, count in head_counts))
        raise ValueError(
            f"Tensor parallel degree ({tp}) must divide {name} ({count}). "
            f"For {_model_name(config)}, max supported TP is {max_tp}."
        )


def _model_name(config) -> str:
    for package in reversed(type(config).__module__.split(".")):
        if package in _MODEL_NAMES:
            name = _MODEL_NAMES[package]
            # Only Qwen has dense and MoE models in one package.
            is_moe = name.startswith("Qwen") and _is_moe(config)
            return f"{name}-MoE" if is_moe else name
    hf_model_type = getattr(config, "model_type", "")
    return hf_model_type or type(config).__qualname__.removesuffix(".Config")
