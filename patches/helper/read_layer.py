"""The qwen3_5_moe generation: one layer config for all, linear attention replicated."""


def _head_counts(config) -> list[tuple[str, int]]:
    # A Hugging Face config has the head counts itself.
    attention = config.layer.attention if hasattr(config, "layer") else config
    head_counts = [("n_heads", attention.n_heads)]
    # None means as many as n_heads; MLA has no such field.
    if getattr(attention, "n_kv_heads", None) is not None:
        head_counts.append(("n_kv_heads", attention.n_kv_heads))
    return head_counts


def _is_moe(config) -> bool:
    return getattr(config.layer, "moe", None) is not None
