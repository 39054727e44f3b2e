"""Configs read as data, beside what the config objects of transformers say, and the names that they use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import torchtitan_tp_validate as tpv
from tests.core.releases.test_huggingface import plan
from torchtitan_tp_validate.releases import huggingface
from torchtitan_tp_validate.releases.huggingface import Framework, layer_heads
from torchtitan_tp_validate.releases.key_value_heads import N_KV_HEADS, unknown_fields
from torchtitan_tp_validate.releases.transformers_plans import release

pytestmark = pytest.mark.skipif(
    release(transformers.__version__) < (5, 23), reason="the names are those of the newest release"
)

NO_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm", "granitemoehybrid"}
"""Text decoders without a single attention layer (the last one in its default configuration)."""
CANNOT_BE_BUILT = {"gemma4_assistant"}
"""Config classes whose defaults transformers itself refuses."""


def text_decoders() -> dict[str, Any]:
    """Model type -> config class of every text decoder that transformers describes."""
    # By their class names: other packages (fla) may register configs of their own under the same types.
    classes = CONFIG_MAPPING_NAMES
    names = (
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    )
    kinds = {kind for name in names for kind in getattr(modeling_auto, name, {})}
    return {kind: getattr(transformers, classes[kind]) for kind in sorted(kinds - CANNOT_BE_BUILT)}


def says(config_object: Any) -> set[tuple[int, int]]:
    """(query heads, key-value heads) of the layers, as transformers' own object gives them."""
    text = config_object.get_text_config(decoder=True)
    if text.model_type in ("blt", "pi0"):  # have two decoders, or one by another name
        text = next(getattr(text, name) for name in ("decoder_config", "vlm_config") if hasattr(text, name))
        return says(text)
    if text.model_type == "falcon":  # models/falcon/modeling_falcon.py, FalconAttention
        grouped = text.new_decoder_architecture or not text.multi_query
        return {(text.num_attention_heads, text.num_kv_heads if grouped else 1)}
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    found = {
        (layer.num_attention_heads, getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
        for layer in layers
    }
    if hasattr(text, "swa_num_attention_heads"):  # models/inkling: the sliding layers' own
        found.add((text.swa_num_attention_heads, text.swa_num_key_value_heads))
    return found


@pytest.fixture(scope="module")
def saved() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Model type -> default config object, and the content of the file that it saves."""
    found = {}
    for kind, cls in text_decoders().items():
        config_object = cls()
        found[kind] = config_object, json.loads(config_object.to_json_string(use_diff=True))
    return found


def validated(saved: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for kind, (config_object, content) in saved.items():
        if kind not in NO_ATTENTION:
            yield kind, config_object, content


def test_all_but_the_models_without_attention_are_validated(saved: dict[str, Any]) -> None:
    not_validated = set()
    for kind, (_, content) in saved.items():
        try:
            layer_heads(content)
        except tpv.PlanError as error:
            not_validated.add(kind)
            print(f"{kind}: {error}")
    print(f"not validated: {len(not_validated)} of {len(saved)}")
    assert not_validated == NO_ATTENTION & saved.keys()
    assert len(saved) > 200
    assert len(not_validated) < 0.03 * len(saved)


def test_the_verdict_is_that_of_transformers_own_config_object(saved: dict[str, Any]) -> None:
    for kind, config_object, content in validated(saved):
        own = says(config_object)
        heads = [dim for dim in plan(content, Framework.TORCHTITAN).dims if dim.code in ("TP001", "TP002")]
        read_heads = {(dim.code, dim.size) for dim in heads}
        assert {size for code, size in read_heads if code == "TP001"} == {q for q, _ in own}, kind
        for tp in (2, 3, 4, 7, 8, 16, 64, 71):
            fits = all(q % tp == kv % tp == 0 for q, kv in own)
            assert all(dim.allows(tp) for dim in heads) is fits, (kind, tp)


def test_a_config_object_gives_the_verdict_of_its_file(
    saved: dict[str, Any],
) -> None:
    with_plan = 0
    for kind, config_object, content in validated(saved):
        brings_one = bool(config_object.get_text_config(decoder=True).base_model_tp_plan)
        with_plan += brings_one
        found: list[list[int] | str] = []
        for what in (config_object, content):
            try:
                found.append(tpv.valid_tp_degrees(what))
            except tpv.PlanError as error:
                found.append(str(error))
        assert found[0] == found[1], kind
        assert not (brings_one and isinstance(found[0], str)), (kind, found)
    assert with_plan > 50


CANONICAL = {
    "num_attention_heads": huggingface._N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "num_hidden_layers": huggingface._N_LAYERS,
}


def test_every_alias_of_transformers_is_in_the_tables() -> None:
    known = {name for table in CANONICAL.values() for name in table}
    aliases, unknown = 0, set()
    for kind, cls in text_decoders().items():
        for config_class in (cls, *sub_configs(cls)):
            for alias, real in getattr(config_class, "attribute_map", {}).items():
                if not CANONICAL.keys() & {alias, real}:
                    continue
                aliases += 1
                unknown |= {f"{kind}: {name}" for name in {alias, real} - known if "encoder" not in name}
    assert not unknown
    assert aliases > 30


def test_no_text_decoder_of_transformers_has_a_count_that_is_not_known() -> None:
    looked_at = 0
    for kind, cls in text_decoders().items():
        content = cls().to_dict()
        for part, _ in huggingface._text_parts(content, ""):
            looked_at += 1
            if any(part.get(name) is not None for name in N_KV_HEADS):
                continue
            known = {"multi_query"}  # Falcon and GPT-BigCode, read before the tables
            assert not {name for name, _ in unknown_fields(part)} - known, kind
    assert looked_at > 200


def sub_configs(cls: Any) -> list[Any]:
    """The classes of a text decoder within a config class."""
    found = getattr(cls, "sub_configs", {})
    return [found[name] for name in huggingface._TEXT_PARTS if hasattr(found.get(name), "attribute_map")]
