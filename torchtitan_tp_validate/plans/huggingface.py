"""Hugging Face configs as data: a ``config.json``, or a config or model of transformers, read by its names.

Neither transformers nor torch is loaded. What is read is the text decoder: every layer's query and
key-value heads, and the key and value heads of its linear attention. What they mean depends on who
splits the model, see `Framework`.

A layer without attention (state space, convolution, feed-forward alone) imposes nothing: neither
framework splits it by heads. What is beside the text decoder (vision, audio) is judged where transformers'
plan cuts its heads; what is not a head is not judged.

Source: ``models/*/configuration_*.py`` (the names, and how raw files are completed) and
``PreTrainedConfig.get_text_config`` of transformers 5.23, and files on the Hugging Face Hub whose model code
is not in transformers (DeciLM, OpenELM, ChatGLM).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.plans.reading import Heads, shortened, whole_number
from torchtitan_tp_validate.rules import Degrees, Findings, Plan


class Framework(Enum):
    """Who splits the model; the value is what people call it."""

    TORCHTITAN = "torchtitan"
    """Every kind of head is split whole: query, key-value and linear-attention heads. The rule of
    torchtitan's own models, applied to any."""
    TRANSFORMERS = "transformers"
    """Native tensor parallelism: query and key-value heads where the model's plan has their projections
    ``colwise``. Linear attention is gathered, and imposes nothing."""


# The names of one thing, the most specific first: encoder-decoders have a decoder's own.
_N_LAYERS = (
    "decoder_layers",
    "num_decoder_layers",
    "decoder_num_hidden_layers",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "layers",
    "num_transformer_layers",
)
_N_HEADS = (
    "num_attention_heads_per_layer",
    "decoder_attention_heads",
    "num_decoder_attention_heads",
    "decoder_num_attention_heads",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "attention_heads",
    "num_query_heads",
)
_N_KV_HEADS = (
    "num_key_value_heads_per_layer",
    "decoder_num_key_value_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
)
_SLIDING_N_HEADS = ("swa_num_attention_heads", "num_sliding_attention_heads")
_SLIDING_N_KV_HEADS = ("swa_num_key_value_heads",)
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern")
_TEXT_PARTS = (
    "text_config",
    "language_config",
    "llm_config",
    "decoder",
    "generator",
    "decoder_config",
    "global_config",  # of BLT, beside its decoder_config
    "thinker_config",
    "vlm_config",
)

_WITHOUT_ATTENTION = frozenset({"conv", "recurrent", "mamba", "mamba2", "moe", "mlp", "M", "E", "-"})
# Models whose num_heads are those of a state-space or recurrent mixer.
_NO_ATTENTION_AT_ALL = frozenset({"mamba2", "xlstm"})

# No model has more; a damaged file may say anything.
_MOST_LAYERS = 10_000
_MOST_HEADS = 1_000_000
_DEEPEST = 8

_LABELS = {
    "TP001": "num_attention_heads",
    "TP002": "num_key_value_heads",
    "TP003": "linear_num_key_heads",
    "TP004": "linear_num_value_heads",
}

_HOW_TO_CHANGE = {
    Framework.TORCHTITAN: "--parallelism.{flag} {degree}",
    Framework.TRANSFORMERS: "tp_size={degree}, as in from_pretrained(...,\n"
    "  distributed_config=DistributedConfig(tp_size={degree}))",
}
_CONSEQUENCE = {
    Framework.TORCHTITAN: "the run starts, and its first forward pass dies in attention with\n"
    "  \"shape '[...]' is invalid for input of size ...\".",
    Framework.TRANSFORMERS: "the model loads without a word, and its first forward pass dies in\n"
    "  attention with \"shape '[...]' is invalid for input of size ...\".",
}


def find_config(model_or_config: Any) -> Mapping[str, Any] | None:
    """The content of a config, or of a model's config, or None when this is neither.

    A ``config.json`` is a mapping; transformers' own objects are recognised by ``model_type`` and
    ``to_dict``.
    """
    if isinstance(model_or_config, Mapping):
        known = ("model_type", *_TEXT_PARTS, *_N_HEADS)
        return model_or_config if any(name in model_or_config for name in known) else None
    for candidate in (model_or_config, getattr(model_or_config, "config", None)):
        to_dict = getattr(candidate, "to_dict", None)
        if callable(to_dict) and hasattr(candidate, "model_type"):
            content: Mapping[str, Any] = to_dict()
            return content
    return None


def read(
    config: Mapping[str, Any],
    model: Any,
    degrees: Degrees,
    *,
    framework: Framework = Framework.TRANSFORMERS,
    tp_plan: Mapping[str, str] | None = None,
) -> Plan:
    """The plan that a framework applies to a model with this config.

    Args:
        config: what `find_config` gave.
        model: where its effective plan is asked for when ``tp_plan`` is not given, see
            `torchtitan_tp_validate.plans.transformers_plans`.
        degrees: not looked into: they change nothing about heads.
        framework: who splits the model.
        tp_plan: transformers' own, module pattern -> style, when it is known; by default that of ``model``,
            or of the classes that its config names.

    Raises:
        PlanError: the config does not tell its head counts, or transformers has no tp_plan for it.
    """
    del degrees
    layers = layer_heads(config)
    beside: Iterable[tuple[str, Mapping[str, Any], set[str]]] = ()
    split: set[str] = set(_LABELS)
    caveats: tuple[str, ...] = ()
    if framework is Framework.TRANSFORMERS:
        # Not loaded with this file: torchtitan's rule does not need it.
        from torchtitan_tp_validate.plans import transformers_plans

        if tp_plan is None:
            parts = [part for part, _ in _text_parts(config, "")]
            tp_plan, caveats = transformers_plans.find_tp_plan(model, config, parts)
            beside = transformers_plans.split_beside(
                {name: part for name, part in config.items() if name not in _TEXT_PARTS}
            )
        split = transformers_plans.split_by(tp_plan)
    having: dict[tuple[str, int], list[int]] = {}
    for index, heads in enumerate(layers):
        for dim in heads.items():
            having.setdefault(dim, []).append(index)
    findings = Findings()
    for (code, size), indices in having.items():
        if code in split:
            findings.add(code, size, _CONSEQUENCE[framework], layers=indices, label=_LABELS[code])
    for name, part, split in beside:
        for code, size in dict.fromkeys(dim for heads in layer_heads(part) for dim in heads.items()):
            if code in split:
                label = f"{name}.{_LABELS[code]}"
                findings.add(code, size, _CONSEQUENCE[framework], place=name, label=label)
    return Plan(
        model=_name(config),
        dims=findings.dims(),
        n_layers=len(layers),
        how_to_change=_HOW_TO_CHANGE[framework],
        not_judged=caveats,
        listed_up_to=max((size for code, size in having if code == "TP001"), default=1),
    )


def layer_heads(config: Mapping[str, Any]) -> tuple[Heads, ...]:
    """The heads of every layer of the text decoder, by rule code; a layer without attention has none.

    Raises:
        PlanError: a count is missing, or is none, or it is not told which layer is of which kind.
    """
    layers = tuple(heads for part, where in _text_parts(config, "") for heads in _layers(part, where))
    if not any(layers):
        raise PlanError(f"Not validated: no layer of {_name(config)} has attention heads.")
    return layers


def _text_parts(config: Mapping[str, Any], where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """``(config, path)`` of each text decoder: what is nested, else the config itself."""
    if where.count(".") > _DEEPEST:
        raise PlanError(f"Not validated: {shortened(where)} is nested too deeply.")
    nested = [name for name in _TEXT_PARTS if isinstance(config.get(name), Mapping)]
    for name in nested:
        yield from _text_parts(config[name], f"{where}{name}.")
    if not nested:
        yield config, where


def _layers(config: Mapping[str, Any], where: str) -> Iterator[Heads]:
    """The heads of each layer of one text decoder; ``where`` is the path of its config, with a dot."""
    if _name(config) in _NO_ATTENTION_AT_ALL:
        raise PlanError(f"Not validated: {_name(config)} has no attention heads.")
    if isinstance(config.get("block_configs"), Sequence):
        yield from _blocks(config, where)
        return
    if _found(config, _N_HEADS) is None:
        raise PlanError(
            f"Not validated: the config has no {where}num_attention_heads (nor n_head, n_heads, num_heads). "
            "A file that older transformers wrote leaves out what equals the class's default: save it again."
        )
    types = _layer_types(config, where) or ["attention"] * _n_layers(config, where)
    n_layers = len(types)
    n_heads = _per_layer(config, _N_HEADS, n_layers, where)
    assert n_heads is not None
    n_kv_heads = _n_kv_heads(config, n_layers, where) or n_heads
    sliding_n_heads = _per_layer(config, _SLIDING_N_HEADS, n_layers, where) or n_heads
    sliding_n_kv_heads = _per_layer(config, _SLIDING_N_KV_HEADS, n_layers, where) or n_kv_heads
    global_n_kv_heads = n_kv_heads
    if config.get("attention_k_eq_v", True):  # Gemma 4 ignores the field where this is off
        global_n_kv_heads = _per_layer(config, ("num_global_key_value_heads",), n_layers, where) or n_kv_heads
    is_latent = _value(config, ("kv_lora_rank",)) is not None
    overrides = _overrides(config, where)
    for layer_type in dict.fromkeys(types):
        attends = any(word in layer_type for word in ("attention", "hybrid", "sparse", "*"))
        if not attends and layer_type not in _WITHOUT_ATTENTION:
            index = types.index(layer_type)
            raise PlanError(f"Not validated: {where}layer {index} is of unknown type {layer_type!r}.")
    for index, layer_type in enumerate(types):
        if layer_type in _WITHOUT_ATTENTION:
            yield {}
            continue
        if "linear" in layer_type:
            yield _linear_attention(config, n_heads[index], where)
            continue
        if "sliding" in layer_type:
            heads, kv_heads = sliding_n_heads[index], sliding_n_kv_heads[index]
        elif layer_type == "full_attention":
            heads, kv_heads = n_heads[index], global_n_kv_heads[index]
        else:
            heads, kv_heads = n_heads[index], n_kv_heads[index]
        if index in overrides:
            path, override = f"{where}per_layer_config[{index}]", overrides[index]
            heads = _count(override.get("num_attention_heads", heads), path)
            kv_heads = _count(override.get("num_key_value_heads", kv_heads), path)
        # Multi-head latent attention expands its latents to query heads, whatever the file says.
        yield {"TP001": heads} if is_latent else {"TP001": heads, "TP002": kv_heads}


def _n_layers(config: Mapping[str, Any], where: str) -> int:
    name, value = _found(config, _N_LAYERS) or (_N_LAYERS[3], None)
    return whole_number(value, f"{where}{name}", at_most=_MOST_LAYERS)


def _layer_types(config: Mapping[str, Any], where: str) -> list[str] | None:
    """What each layer is, or None when all are alike.

    Raises:
        PlanError: they are not alike, and the config does not tell which is which.
    """
    name, types = _found(config, _LAYER_TYPES) or ("", None)
    if types is not None:
        if not isinstance(types, Sequence) or not types or not all(isinstance(t, str) for t in types):
            raise PlanError(f"Not validated: {where}{name} must be a list of names, got {shortened(types)}.")
        declared = _found(config, _N_LAYERS)
        n_layers = len(types) if declared is None else _n_layers(config, where)
        if name == "block_types":  # RecurrentGemma repeats its pattern
            return [types[index % len(types)] for index in range(n_layers)]
        if name == "layer_types" and n_layers != len(types):
            raise PlanError(
                f"Not validated: {where}layer_types names {len(types)} layers, and {where}{declared[0]} "  # type: ignore[index]
                f"is {n_layers}."
            )
        return list(types)
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(linear.get("full_attn_layers"), Sequence):
        full = linear["full_attn_layers"]  # counted from 1
        return [
            "full_attention" if index + 1 in full else "linear_attention"
            for index in range(_n_layers(config, where))
        ]
    if isinstance(config.get("full_attention_interval"), int) and config["full_attention_interval"] > 0:
        interval = config["full_attention_interval"]
        return [
            "linear_attention" if (index + 1) % interval else "full_attention"
            for index in range(_n_layers(config, where))
        ]
    if isinstance(config.get("attn_layer_period"), int) and config["attn_layer_period"] > 0:
        period, offset = config["attn_layer_period"], config.get("attn_layer_offset", 0)
        return [
            "full_attention" if index % period == offset else "mamba"
            for index in range(_n_layers(config, where))
        ]
    of_some_layers = ("linear_num_key_heads", "linear_num_heads", "linear_attn_config")
    of_others = (*_SLIDING_N_HEADS, *_SLIDING_N_KV_HEADS)
    mixed = _found(config, (*of_some_layers, *of_others))
    if mixed is not None:
        raise PlanError(
            f"Not validated: the config has {where}{mixed[0]} for some of its layers, but no "
            f"{where}layer_types that says for which."
        )
    return None


def _per_layer(
    config: Mapping[str, Any], names: Sequence[str], n_layers: int, where: str
) -> list[int] | None:
    """A count for each layer: one number for all of them, or a list."""
    found = _found(config, names)
    if found is None:
        return None
    name, value = found
    if not isinstance(value, list):
        return [_count(value, f"{where}{name}")] * n_layers
    if len(value) != n_layers:
        raise PlanError(
            f"Not validated: {where}{name} counts {len(value)} layers, but the model has {n_layers}."
        )
    return [_count(count, f"{where}{name}[{index}]") for index, count in enumerate(value)]


def _n_kv_heads(config: Mapping[str, Any], n_layers: int, where: str) -> list[int] | None:
    """Key-value heads of each layer, or None when every query head has its own."""
    # Falcon's new architecture has groups, whatever it says about multi-query.
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        return [1] * n_layers
    if config.get("multi_query_attention") is True:
        return _per_layer(config, ("multi_query_group_num",), n_layers, where) or [1] * n_layers
    attn_config = config.get("attn_config")
    if isinstance(attn_config, Mapping) and _found(attn_config, ("kv_n_heads",)):
        return _per_layer(attn_config, ("kv_n_heads",), n_layers, f"{where}attn_config.")
    found = _per_layer(config, _N_KV_HEADS, n_layers, where)
    if found is None and where and not any(name in config for name in _N_KV_HEADS) and _is_diff(config):
        raise PlanError(
            f"Not validated: {where}num_key_value_heads is left out, as older transformers does with what "
            "equals the class's default: save the config again, or set it."
        )
    return found


def _is_diff(config: Mapping[str, Any]) -> bool:
    """Whether a nested config was written without its defaults: a full one says how weights begin."""
    return not any(name.startswith(("init", "layer_norm", "rms_norm")) for name in config)


def _overrides(config: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]]:
    """Layer index -> what differs there, as transformers writes configs with unequal layers."""
    per_layer = config.get("per_layer_config") or {}
    if not isinstance(per_layer, Mapping) or not all(isinstance(v, Mapping) for v in per_layer.values()):
        raise PlanError(
            f"Not validated: {where}per_layer_config must map layers to their settings, "
            f"got {shortened(per_layer)}."
        )
    try:
        return {int(index): settings for index, settings in per_layer.items()}
    except (TypeError, ValueError) as error:
        raise PlanError(f"Not validated: a key of {where}per_layer_config is no layer: {error}.") from error


def _linear_attention(config: Mapping[str, Any], n_heads: int, where: str) -> Heads:
    """The heads of a linear-attention layer; those of a state-space mixer are not split."""
    both = _value(config, ("linear_num_heads",))
    inner = config.get("linear_attn_config")
    if both is None and isinstance(inner, Mapping):
        both = _value(inner, ("num_heads",))
    if both is not None:
        count = _count(both, f"{where}linear_num_heads")
        return {"TP003": count, "TP004": count}
    if config.get("linear_num_key_heads") is not None:
        return {
            "TP003": _count(config["linear_num_key_heads"], f"{where}linear_num_key_heads"),
            "TP004": _count(config.get("linear_num_value_heads"), f"{where}linear_num_value_heads"),
        }
    if any(name.startswith(("mamba_", "n_mamba_", "ssm_")) for name in config):
        return {}
    return {"TP001": n_heads}


def _blocks(config: Mapping[str, Any], where: str) -> Iterator[Heads]:
    """DeciLM: every block says how many query heads share a key-value head, or that it has no attention."""
    name, value = _found(config, _N_HEADS) or (_N_HEADS[4], None)
    n_heads = _count(value, f"{where}{name}")
    for index, block in enumerate(config["block_configs"]):
        attention = block.get("attention") if isinstance(block, Mapping) else None
        path = f"{where}block_configs[{index}].attention"
        if not isinstance(attention, Mapping):
            raise PlanError(f"Not validated: {path} is missing.")
        if attention.get("no_op") or attention.get("replace_with_linear"):
            yield {}
        else:
            group = _count(attention.get("n_heads_in_group"), f"{path}.n_heads_in_group")
            yield {"TP001": n_heads, "TP002": _count(n_heads // group, path)}


def _found(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any] | None:
    """The first of these names that has a value, and the value."""
    return next(((name, config[name]) for name in names if config.get(name) is not None), None)


def _value(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    found = _found(config, names)
    return None if found is None else found[1]


def _count(value: Any, name: str) -> int:
    return whole_number(value, name, at_most=_MOST_HEADS)


def _name(config: Mapping[str, Any]) -> str:
    name = config.get("model_type")
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 60 else "this model"
