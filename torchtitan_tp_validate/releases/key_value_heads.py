"""The numbers that a Hugging Face config gives its layers, whatever it calls them: above all key-value heads.

A name that is not known must not pass for "every query head has its own": that would accept degrees at
which the run dies. What merely looks like a count of shared heads is "not validated".

Source: the attribute maps and fields of ``models/*/configuration_*.py`` of transformers, and the files
beside the weights of models whose code is not in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.releases.reading import head_count, shortened

N_KV_HEADS = (
    "num_key_value_heads_per_layer",
    "decoder_num_key_value_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "kv_n_heads",
    "n_head_kv",  # the first Falcons, RefinedWeb
    "num_attention_groups",  # Step-3.5
    "num_multi_query_heads",  # CogVLM2
    "num_query_groups",  # CodeShell, and whatever comes from Megatron
    "n_query_groups",
)
"""Numbers of key-value heads, the most specific first."""
_N_SHARING = ("n_shared_head", "proj_groups")  # PLaMo, StripedHyena
"""Numbers of query heads that share a key-value head."""
_READ_ELSEWHERE = frozenset({"multi_query_group_num"})
"""Of ChatGLM, which counts only where its switch is on."""
_MULTI_QUERY = ("multiquery", "multiquery_attention", "multi_query", "multi_query_attention", "mqa")

_LOOKS_SHARED = re.compile(
    r"(?<![a-z])(kv|key_?values?|gqa|mqa)(?![a-z])|multi_?query|group(ed)?_?query"
    r"|(query|attention|attn|heads?)_?groups?|groups?_?(of_)?heads?|shared?_?heads?|heads?_?kv|kv_?heads?|n_?kv|heads?_(per|in)_group"
)
"""Names that may count key-value heads, or say that they are shared."""
_ANOTHER_THING = re.compile(
    r"cache|lora|rank|channel|dim|size|bias|norm|quant|bits|dtype|clip|conv|kernel|stride|padding|mamba|ssm"
    r"|expert|moe|router|index|vision|image|audio|window|^d_kv$|^post_|^(?!.*head).*layers"
)
"""Names of something else: caches, latents, sizes, other parts of the model."""
_SAYS_SHARED = re.compile(r"multi[_-]?query|group(ed)?[_-]?query|\b(gqa|mqa)\b", re.IGNORECASE)


def found(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Any] | None:
    """Return the first of these names that has a value, and the value."""
    return next(((name, config[name]) for name in names if config.get(name) is not None), None)


def value_of(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the value of the first of these names that has one, or None."""
    first = found(config, names)
    return None if first is None else first[1]


def per_layer(config: Mapping[str, Any], names: Sequence[str], n_layers: int, where: str) -> list[int] | None:
    """Return a number of heads for each layer, given as one number for all of them or as a list.

    Args:
        names: what the field may be called.
        where: path of ``config`` in its file, with a dot.

    Raises:
        PlanError: it is not a number of heads, or the list is not as long as the model.
    """
    first = found(config, names)
    if first is None:
        return None
    name, value = first
    if not isinstance(value, (list, tuple)):
        return [head_count(value, f"{where}{name}")] * n_layers
    if len(value) != n_layers:
        raise PlanError(f"{where}{name} counts {len(value)} layers, but the model has {n_layers}.")
    return [head_count(count, f"{where}{name}[{index}]") for index, count in enumerate(value)]


def n_kv_heads(config: Mapping[str, Any], n_heads: Sequence[int], where: str) -> list[int] | None:
    """Return the key-value heads of each layer, or None when every query head has its own.

    Args:
        config: the text decoder's.
        n_heads: query heads of each layer.
        where: path of ``config`` in its file, with a dot.

    Raises:
        PlanError: they are shared, and it is not told by how many; or a default was left out of the file.
    """
    n_layers = len(n_heads)
    # Falcon's new architecture has groups, whatever it says about multi-query.
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        return [1] * n_layers
    if config.get("multi_query_attention") is True:
        return per_layer(config, ("multi_query_group_num",), n_layers, where) or [1] * n_layers
    if _is_multi_query(config.get("attention_head_type")):  # SantaCoder
        return [1] * n_layers
    attn_config = config.get("attn_config")
    if isinstance(attn_config, Mapping):  # MPT, DBRX
        if _is_multi_query(attn_config.get("attn_type")):
            return [1] * n_layers
        inner = per_layer(attn_config, N_KV_HEADS, n_layers, f"{where}attn_config.")
        if inner is not None:
            return inner
    if config.get("group_query_attention") is False:  # CodeShell
        return None
    named = per_layer(config, N_KV_HEADS, n_layers, where)
    if named is not None:
        return named
    sharing = found(config, _N_SHARING)
    if sharing is not None:
        return _shared_by(n_heads, f"{where}{sharing[0]}", sharing[1])
    if where and not any(name in config for name in N_KV_HEADS) and _is_diff(config):
        raise PlanError(
            f"{where}num_key_value_heads is left out, as older transformers does with what "
            "equals the class's default: save the config again, or set it."
        )
    for name, value in unknown_fields(config):
        raise PlanError(
            f"{where}{name} ({shortened(value)}) looks like a number of shared key-value "
            f"heads, under a name that is not known. Set {where}num_key_value_heads to what the model has."
        )
    return None


def unknown_fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, value)`` of what looks like a number of key-value heads under a name not known here.

    Settings of attention that are kept in a group of their own are looked into too: there, even a known name
    has not been read.
    """
    for name, value in config.items():
        if not isinstance(name, str):
            continue
        lowered = name.lower()
        of_attention = "attn" in lowered or "attention" in lowered
        if isinstance(value, Mapping):
            if of_attention and not _ANOTHER_THING.search(lowered):
                yield from ((f"{name}.{inner}", value[inner]) for inner, _ in unknown_fields(value))
        elif isinstance(value, str):
            if of_attention and _SAYS_SHARED.search(value):
                yield name, value
        elif name in _READ_ELSEWHERE:
            continue
        elif value and _LOOKS_SHARED.search(lowered) and not _ANOTHER_THING.search(lowered):
            yield name, value


def _is_multi_query(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in _MULTI_QUERY


def _shared_by(n_heads: Sequence[int], name: str, value: Any) -> list[int]:
    sharing = head_count(value, name)
    if any(count % sharing for count in n_heads):
        count = next(count for count in n_heads if count % sharing)
        raise PlanError(
            f"{name} ({sharing}) query heads share a key-value head, which does not divide "
            f"num_attention_heads ({count}): correct the config."
        )
    return [count // sharing for count in n_heads]


def _is_diff(config: Mapping[str, Any]) -> bool:
    """Whether a nested config was written without its defaults: a full one says how weights begin."""
    return not any(str(name).startswith(("init", "layer_norm", "rms_norm")) for name in config)
