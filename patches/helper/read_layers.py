"""torchtitan 0.3.x: every layer has a config of its own."""


def _head_counts(config) -> list[tuple[str, int]]:
    if hasattr(config, "layers"):
        layers = [*config.layers, *getattr(config, "mtp_layers", [])]
        attentions = [x.attention for x in layers if x.attention is not None]
        delta_nets = [x.delta_net for x in layers if getattr(x, "delta_net", None)]
    else:
        # A Hugging Face config has one set of head counts for all layers.
        attentions, delta_nets = [config], []
    # None means as many as n_heads; MLA has no such field.
    n_kv_heads = [getattr(x, "n_kv_heads", None) for x in attentions]
    return [
        *(("n_heads", x.n_heads) for x in attentions),
        *(("n_kv_heads", n) for n in n_kv_heads if n is not None),
        *(
            ("n_key_heads", x.in_proj_q.out_features // x.key_head_dim)
            for x in delta_nets
        ),
        *(
            ("n_value_heads", x.in_proj_v.out_features // x.value_head_dim)
            for x in delta_nets
        ),
    ]


def _is_moe(config) -> bool:
    return any(getattr(layer, "moe", None) is not None for layer in config.layers)
