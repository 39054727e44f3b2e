"""torchtitan 0.2.x: the model args have one set of head counts for all layers."""


def _head_counts(model_args) -> list[tuple[str, int]]:
    head_counts = [("n_heads", model_args.n_heads)]
    # None means as many as n_heads; MLA has no such field.
    if getattr(model_args, "n_kv_heads", None) is not None:
        head_counts.append(("n_kv_heads", model_args.n_kv_heads))
    return head_counts


def _is_moe(model_args) -> bool:
    return getattr(model_args, "moe_enabled", False)
