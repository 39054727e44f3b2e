"""Hugging Face configs as data: a ``config.json``, or a config or model of transformers, read by its names.

Neither transformers nor torch is loaded. What is read is the text decoder: every layer's query and
key-value heads, and the key and value heads of its linear attention. What they mean depends on who
splits the model, see `Framework`; what torchtitan splits beside them is in ``huggingface_sizes.py``.

A layer without attention (state space, convolution, feed-forward alone) imposes nothing: neither
framework splits it by heads. What is beside the text decoder (vision, audio) is judged where transformers'
plan cuts its heads, or torchtitan has a model of the family.

Source: ``models/*/configuration_*.py`` (the names, and how raw files are completed) and
``PreTrainedConfig.get_text_config`` of transformers 5.23, and files on the Hugging Face Hub whose model code
is not in transformers (DeciLM, OpenELM, ChatGLM, StripedHyena, MiMo, Step, flash-linear-attention).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import NotAModelConfigError, PlanError
from torchtitan_tp_validate.models import hf_model_types
from torchtitan_tp_validate.plan import Plan, PlanBuilder
from torchtitan_tp_validate.releases.huggingface_sizes import note_sizes
from torchtitan_tp_validate.releases.key_value_heads import N_KV_HEADS, found, n_kv_heads, per_layer, value_of
from torchtitan_tp_validate.releases.reading import Heads, head_count, share_kv_heads, shortened, whole_number
from torchtitan_tp_validate.releases.rows import line_of
from torchtitan_tp_validate.rules import Line


class Framework(Enum):
    """Who splits the model; the value is what people call it."""

    TORCHTITAN = "torchtitan"
    """Every kind of head is split whole: query, key-value and linear-attention heads. The rule of
    torchtitan's own models, applied to any; where it has a model of the family, its other sizes too."""
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
_SLIDING_N_HEADS = ("swa_num_attention_heads", "num_sliding_attention_heads")
_SLIDING_N_KV_HEADS = ("swa_num_key_value_heads",)
_N_MTP = "num_nextn_predict_layers"
_OTHER_SETTING = "attention_other_setting"  # of Step-3.5: what differs in its sliding layers
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern")
_PATTERNS = {
    "hybrid_layer_pattern": ("full_attention", "sliding_attention"),  # MiMo-V2
    "attn_type_list": ("linear_attention", "full_attention"),  # MiniMax-01
}
"""A number for every layer, and what 0 and 1 stand for."""
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

_WITHOUT_ATTENTION = frozenset({"conv", "hyena", "recurrent", "mamba", "mamba2", "moe", "mlp", "M", "E", "-"})
# Models whose num_heads, if they have any, are those of a state-space or recurrent mixer.
_NO_ATTENTION_AT_ALL = frozenset(
    {
        *("mamba", "mamba2", "falcon_mamba", "log_linear_mamba2", "xlstm", "hgrn"),
        *("rwkv", "rwkv5", "rwkv6", "rwkv7"),
    }
)
# Hybrids of flash-linear-attention whose other layers are state-space mixers.
_STATE_SPACE_HYBRIDS = frozenset({"mamba", "mamba2", "log_linear_mamba2", "samba"})
_OF_A_MODEL = ("model_type", "architectures", "hidden_size", "d_model", "n_embd", "vocab_size")
"""One of these is in every model's config, and in no other file."""

# No model has more; a damaged file may say anything.
_MOST_LAYERS = 10_000
_DEEPEST = 8

_LABELS = {
    "TP001": "num_attention_heads",
    "TP002": "num_key_value_heads",
    "TP003": "linear_num_key_heads",
    "TP004": "linear_num_value_heads",
}

_HOW_TO_CHANGE = {
    Framework.TORCHTITAN: ("--parallelism.{flag} {degree}",),
    Framework.TRANSFORMERS: (
        "tp_size={degree}, as in from_pretrained(...,",
        "distributed_config=DistributedConfig(tp_size={degree}))",
    ),
}
_HOW_TO_REPLICATE = "--replicate-kv-heads"
_LINE = {Framework.TORCHTITAN: Line.ANY_TORCHTITAN, Framework.TRANSFORMERS: Line.TRANSFORMERS}
"""Whose heads are split."""


def find_config(model_or_config: Any) -> Mapping[str, Any] | None:
    """Return the content of a config, or of a model's config, or None when this is neither.

    A ``config.json`` is a mapping; transformers' own objects are recognized by ``model_type`` and
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
    """Return the plan that a framework applies to a model with this config.

    Args:
        config: what `find_config` gave.
        model: where its effective plan is asked for when ``tp_plan`` is not given, see
            `torchtitan_tp_validate.releases.transformers_plans`.
        degrees: of the run. torchtitan's rule also judges experts by expert parallelism, the sequence by
            tensor and context parallelism, and shared key-value heads; transformers' rule knows none of them.
        framework: who splits the model.
        tp_plan: transformers' own, module pattern -> style, when it is known; by default that of ``model``,
            or of the classes that its config names.

    Raises:
        NotAModelConfigError: it is no model's config.
        PlanError: the config does not tell its head counts, or transformers has no tp_plan for it.
    """
    layers = layer_heads(config)
    beside: Iterable[tuple[str, Mapping[str, Any], set[str]]] = ()
    split: set[str] = set(_LABELS)
    caveats: tuple[str, ...] = ()
    if framework is Framework.TRANSFORMERS:
        # Not loaded with this file: torchtitan's rule does not need it.
        from torchtitan_tp_validate.releases import transformers_plans

        if tp_plan is None:
            decoders = [part for part, _ in _text_parts(config, "")]
            tp_plan, caveats = transformers_plans.find_tp_plan(model, config, decoders)
            beside = transformers_plans.split_beside(
                {name: part for name, part in config.items() if name not in _TEXT_PARTS}
            )
        split = transformers_plans.split_by(tp_plan)
    having: dict[tuple[str, int], list[int]] = {}
    for index, heads in enumerate(layers):
        for dim in heads.items():
            having.setdefault(dim, []).append(index)
    findings = PlanBuilder(line_of(degrees))
    for (code, size), indices in having.items():
        if code in split:
            findings.add(code, size, line=_LINE[framework], layers=indices, label=_LABELS[code])
    for name, part, split in beside:
        for code, size in dict.fromkeys(dim for heads in layer_heads(part) for dim in heads.items()):
            if code in split:
                label = f"{name}.{_LABELS[code]}"
                findings.add(code, size, line=_LINE[framework], place=name, label=label)
    shared: PlanBuilder | None = None
    if framework is Framework.TRANSFORMERS:
        not_judged = (*caveats, *_unknown_to_transformers(degrees))
    else:
        parts = list(_text_parts(config, ""))
        not_judged = tuple(note_sizes(findings, config, parts, degrees))
        shared = _shared_kv_heads(config, parts, layers, line_of(degrees))
    plan = Plan(
        model=_name(config),
        dims=findings.dims(),
        n_layers=len(layers),
        how_to_change=_HOW_TO_CHANGE[framework],
        degrees=degrees,
        not_judged=not_judged,
        how_to_replicate=_HOW_TO_REPLICATE if shared else "",
        shared_kv=shared.dims() if shared else (),
        listed_up_to=max((size for code, size in having if code == "TP001"), default=1),
    )
    return plan.with_kv_replication() if degrees.replicate_kv_heads else plan


def _unknown_to_transformers(degrees: Degrees) -> Iterator[str]:
    """Yield what was requested that transformers' tensor parallelism has no word for."""
    requested = {
        "an expert parallel degree": degrees.ep > 1,
        "a context parallel degree": degrees.cp > 1,
        "a sequence length": degrees.seq_len is not None,
        "KV-head replication": degrees.replicate_kv_heads,
    }
    yield from (f"{name}: no part of transformers' rule" for name, is_set in requested.items() if is_set)


def _shared_kv_heads(
    config: Mapping[str, Any],
    parts: Sequence[tuple[Mapping[str, Any], str]],
    layers: Sequence[Heads],
    line: Line,
) -> PlanBuilder | None:
    """Return what takes the place of whole key-value heads under KV-head replication, if anything does."""
    if _name(config) not in hf_model_types(sharing_kv_heads_in="0.3") or len(parts) != 1:
        return None
    ((part, where),) = parts
    shared = PlanBuilder(line)
    for index, heads in enumerate(layers):
        if "TP002" not in heads:
            continue
        head_dim = part.get("head_dim")
        if head_dim is None and isinstance(part.get("hidden_size"), int):
            head_dim = part["hidden_size"] // heads["TP001"]
        if head_dim is None:
            return None
        share_kv_heads(shared, heads["TP002"], head_count(head_dim, f"{where}head_dim"), (index,))
    return shared


def layer_heads(config: Mapping[str, Any]) -> tuple[Heads, ...]:
    """Return the heads of every layer of the text decoder, by rule code; a layer without attention has none.

    Raises:
        PlanError: a count is missing, or is none, or it is not told which layer is of which kind.
    """
    layers = tuple(heads for part, where in _text_parts(config, "") for heads in _layers(part, where))
    if not any(layers):
        raise PlanError(f"no layer of {_name(config)} has attention heads.")
    return layers


def _text_parts(config: Mapping[str, Any], where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """``(config, path)`` of each text decoder: what is nested, else the config itself."""
    if where.count(".") > _DEEPEST:
        raise PlanError(f"{shortened(where)} is nested too deeply.")
    nested = [name for name in _TEXT_PARTS if isinstance(config.get(name), Mapping)]
    for name in nested:
        yield from _text_parts(config[name], f"{where}{name}.")
    if not nested:
        yield config, where


def _layers(config: Mapping[str, Any], where: str) -> Iterator[Heads]:
    """Yield the heads of each layer of one text decoder; ``where`` is the path of its config, with a dot."""
    hybrid = config.get("attn")
    if isinstance(hybrid, Mapping) and "layers" in hybrid:
        yield from _hybrid_of_linear_attention(config, hybrid, where)
        return
    if _name(config) in _NO_ATTENTION_AT_ALL:
        raise PlanError(f"{_name(config)} has no attention heads.")
    if isinstance(config.get("block_configs"), Sequence):
        yield from _blocks(config, where)
        return
    if found(config, _N_HEADS) is None:
        raise _without_heads(config, where)
    types = _layer_types(config, where) or ["attention"] * _n_layers(config, where)
    n_layers = len(types)
    n_heads = per_layer(config, _N_HEADS, n_layers, where)
    assert n_heads is not None
    is_latent = value_of(config, ("kv_lora_rank",)) is not None and config.get("use_mla") is not False
    kv_heads_of = (None if is_latent else n_kv_heads(config, n_heads, where)) or n_heads
    sliding_n_heads = per_layer(config, _SLIDING_N_HEADS, n_layers, where) or n_heads
    sliding_n_kv_heads = per_layer(config, _SLIDING_N_KV_HEADS, n_layers, where) or kv_heads_of
    other = config.get(_OTHER_SETTING)
    if isinstance(other, Mapping):
        path = f"{where}{_OTHER_SETTING}."
        sliding_n_heads = per_layer(other, _N_HEADS, n_layers, path) or sliding_n_heads
        sliding_n_kv_heads = per_layer(other, N_KV_HEADS, n_layers, path) or sliding_n_kv_heads
    global_n_kv_heads = kv_heads_of
    if config.get("attention_k_eq_v", True):  # Gemma 4 ignores the field where this is off
        global_n_kv_heads = per_layer(config, ("num_global_key_value_heads",), n_layers, where) or kv_heads_of
    overrides = _overrides(config, where)
    for layer_type in dict.fromkeys(types):
        attends = any(word in layer_type for word in ("attention", "hybrid", "sparse", "*"))
        if not attends and layer_type not in _WITHOUT_ATTENTION:
            index = types.index(layer_type)
            raise PlanError(f"{where}layer {index} is of unknown type {shortened(layer_type)}.")
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
            heads, kv_heads = n_heads[index], kv_heads_of[index]
        if index in overrides:
            path, override = f"{where}per_layer_config[{index}]", overrides[index]
            heads = head_count(override.get("num_attention_heads", heads), path)
            kv_heads = head_count(override.get("num_key_value_heads", kv_heads), path)
        # Multi-head latent attention expands its latents to query heads, whatever the file says.
        yield {"TP001": heads} if is_latent else _grouped(heads, kv_heads, f"{where}layer {index}")


def _grouped(n_heads: int, n_kv_heads: int, where: str) -> Heads:
    """Return the heads of a layer whose key-value heads each serve as many query heads as any other.

    Raises:
        PlanError: they cannot.
    """
    if n_heads % n_kv_heads:
        raise PlanError(
            f"{where} has {n_heads} query heads and {n_kv_heads} key-value heads, which do "
            "not divide them. No model can have that: one of the two numbers in the config is wrong."
        )
    return {"TP001": n_heads, "TP002": n_kv_heads}


def _without_heads(config: Mapping[str, Any], where: str) -> PlanError:
    """Return what to raise for a config that has no number of attention heads: it says what the file is."""
    if not where and config.get("peft_type") is not None:
        base = shortened(config.get("base_model_name_or_path"))
        return NotAModelConfigError(
            f"this is the config of a PEFT adapter, not of a model: judge that of its base model, {base}."
        )
    is_state_space = any(isinstance(name, str) and name.startswith(("ssm_", "state_size")) for name in config)
    if is_state_space and not config.get("attn_layer_idx"):
        return PlanError(f"{_name(config)} is a state-space model, which has no attention heads.")
    if not where and found(config, (*_OF_A_MODEL, *_N_LAYERS)) is None:
        return NotAModelConfigError(
            "this is not the config of a model: it has no model_type, and no "
            "num_attention_heads (nor n_head, n_heads, num_heads)."
        )
    return PlanError(
        f"the config has no {where}num_attention_heads (nor n_head, n_heads, num_heads). "
        "A file that older transformers wrote leaves out what equals the class's default: save it again."
    )


def _hybrid_of_linear_attention(
    config: Mapping[str, Any], attn: Mapping[str, Any], where: str
) -> Iterator[Heads]:
    """flash-linear-attention: some layers attend, with heads of their own; the others have the model's."""
    n_layers = _n_layers(config, where)
    attends = _positions(attn["layers"], f"{where}attn.layers")
    heads = head_count(attn.get("num_heads"), f"{where}attn.num_heads")
    kv_heads = head_count(value_of(attn, N_KV_HEADS) or heads, f"{where}attn.num_kv_heads")
    others: Heads = {}
    if _name(config) not in _STATE_SPACE_HYBRIDS:
        keys = head_count(value_of(config, _N_HEADS), f"{where}num_heads")
        values = value_of(config, ("num_v_heads", "num_kv_heads")) or keys
        others = {"TP003": keys, "TP004": head_count(values, f"{where}num_v_heads")}
    for index in range(n_layers):
        yield _grouped(heads, kv_heads, f"{where}attn") if index in attends else others


def _positions(value: Any, name: str) -> frozenset[int]:
    """Return a list of layer numbers.

    Raises:
        PlanError: it is something else.
    """
    if not isinstance(value, (list, tuple)) or not all(type(number) is int for number in value):
        raise PlanError(f"{name} must be a list of layer numbers, got {shortened(value)}.")
    return frozenset(value)


def _n_layers(config: Mapping[str, Any], where: str) -> int:
    name, value = found(config, _N_LAYERS) or (_N_LAYERS[3], None)
    return whole_number(value, f"{where}{name}", at_most=_MOST_LAYERS)


def _layer_types(config: Mapping[str, Any], where: str) -> list[str] | None:
    """Return what each layer is, or None when all are alike.

    Raises:
        PlanError: they are not alike, and the config does not tell which is which.
    """
    name, types = found(config, _LAYER_TYPES) or ("", None)
    if types is not None:
        if not isinstance(types, Sequence) or not types or not all(isinstance(t, str) for t in types):
            raise PlanError(f"{where}{name} must be a list of names, got {shortened(types)}.")
        declared = found(config, _N_LAYERS)
        n_layers = len(types) if declared is None else _n_layers(config, where)
        if name == "block_types":  # RecurrentGemma repeats its pattern
            return [types[index % len(types)] for index in range(n_layers)]
        if name == "layer_types" and len(types) > n_layers and len(types) - n_layers == config.get(_N_MTP):
            return list(types[:n_layers])  # Step-3.5 names those of its multi-token prediction too
        if name == "layer_types" and n_layers != len(types):
            raise PlanError(
                f"{where}layer_types names {len(types)} layers, and {where}{declared[0]} "  # type: ignore[index]
                f"is {n_layers}."
            )
        return list(types)
    inferred = _inferred_layer_types(config, where)
    if inferred is not None:
        return inferred
    of_some_layers = ("linear_num_key_heads", "linear_num_heads", "linear_attn_config")
    of_others = (*_SLIDING_N_HEADS, *_SLIDING_N_KV_HEADS, _OTHER_SETTING)
    mixed = found(config, (*of_some_layers, *of_others))
    if mixed is not None:
        raise PlanError(
            f"the config has {where}{mixed[0]} for some of its layers, but no "
            f"{where}layer_types that says for which."
        )
    return None


def _inferred_layer_types(config: Mapping[str, Any], where: str) -> list[str] | None:
    """Return what each layer is, where the config has a rule, a pattern or positions in place of names."""
    for name, kinds in _PATTERNS.items():
        pattern = config.get(name)
        if pattern is None:
            continue
        if not isinstance(pattern, (list, tuple)) or not all(kind in (0, 1) for kind in pattern):
            raise PlanError(f"{where}{name} must be a list of 0 and 1, got {shortened(pattern)}.")
        n_layers = _n_layers(config, where)
        if len(pattern) != n_layers:
            raise PlanError(f"{where}{name} counts {len(pattern)} layers, but the model has {n_layers}.")
        return [kinds[kind] for kind in pattern]
    if config.get("attn_layer_idxs") is not None:  # StripedHyena
        attends = _positions(config["attn_layer_idxs"], f"{where}attn_layer_idxs")
        return ["full_attention" if i in attends else "hyena" for i in range(_n_layers(config, where))]
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and linear.get("full_attn_layers") is not None:
        full = _positions(linear["full_attn_layers"], f"{where}linear_attn_config.full_attn_layers")
        return [
            "full_attention" if index + 1 in full else "linear_attention"  # counted from 1
            for index in range(_n_layers(config, where))
        ]
    for name, before, other in (
        ("full_attention_interval", 1, "linear_attention"),
        ("attn_layer_period", 0, "mamba"),
    ):
        if config.get(name) is not None:
            interval = whole_number(config[name], f"{where}{name}")
            offset = config.get("attn_layer_offset", 0) if name == "attn_layer_period" else 0
            return [
                "full_attention" if (index + before) % interval == offset else other
                for index in range(_n_layers(config, where))
            ]
    return None


def _overrides(config: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]]:
    """Layer index -> what differs there, as transformers writes configs with unequal layers."""
    per_layer = config.get("per_layer_config") or {}
    if not isinstance(per_layer, Mapping) or not all(isinstance(v, Mapping) for v in per_layer.values()):
        raise PlanError(
            f"{where}per_layer_config must map layers to their settings, got {shortened(per_layer)}."
        )
    try:
        return {int(index): settings for index, settings in per_layer.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"a key of {where}per_layer_config is no layer: {shortened(str(error))}.") from error


def _linear_attention(config: Mapping[str, Any], n_heads: int, where: str) -> Heads:
    """Return the heads of a linear-attention layer; those of a state-space mixer are not split."""
    both = value_of(config, ("linear_num_heads",))
    inner = config.get("linear_attn_config")
    if both is None and isinstance(inner, Mapping):
        both = value_of(inner, ("num_heads",))
    if both is not None:
        count = head_count(both, f"{where}linear_num_heads")
        return {"TP003": count, "TP004": count}
    if config.get("linear_num_key_heads") is not None:
        return {
            "TP003": head_count(config["linear_num_key_heads"], f"{where}linear_num_key_heads"),
            "TP004": head_count(config.get("linear_num_value_heads"), f"{where}linear_num_value_heads"),
        }
    if any(str(name).startswith(("mamba_", "n_mamba_", "ssm_")) for name in config):
        return {}
    return {"TP001": n_heads}


def _blocks(config: Mapping[str, Any], where: str) -> Iterator[Heads]:
    """DeciLM: every block says how many query heads share a key-value head, or that it has no attention."""
    name, value = found(config, _N_HEADS) or (_N_HEADS[4], None)
    n_heads = head_count(value, f"{where}{name}")
    for index, block in enumerate(config["block_configs"]):
        attention = block.get("attention") if isinstance(block, Mapping) else None
        path = f"{where}block_configs[{index}].attention"
        if not isinstance(attention, Mapping):
            raise PlanError(f"{path} is missing.")
        if attention.get("no_op") or attention.get("replace_with_linear"):
            yield {}
        else:
            group = head_count(attention.get("n_heads_in_group"), f"{path}.n_heads_in_group")
            yield {"TP001": n_heads, "TP002": head_count(n_heads // group, path)}


def _name(config: Mapping[str, Any]) -> str:
    name = config.get("model_type")
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 60 else "this model"
