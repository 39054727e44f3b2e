"""Tiny random transformers models: two families with an output head rule upstream, and two that lack one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 256

EIGHT_OF_5_23 = [
    "AudioFlamingo3ForConditionalGeneration",
    "MuseSparkForConditionalGeneration",
    "MusicFlamingoForConditionalGeneration",
    "Nemotron3_5TranscribeForConditionalGeneration",
    "NemotronHForCausalLM",
    "Qwen2AudioForConditionalGeneration",
    "VibeVoiceAsrForConditionalGeneration",
    "VoxtralForConditionalGeneration",
]
"""The classes of transformers 5.23 that own an output head without a rule for it."""

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**text: Any) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM, LlamaConfig(**{**_TEXT, **text})


def qwen3_5_moe(**text: Any) -> tuple[Any, Any]:
    """The vision-language wrapper, three linear-attention layers and one with full attention."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    moe = {
        **_TEXT,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        **text,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "num_position_embeddings": 16,
    }
    tied = text.get("tie_word_embeddings", False)
    tokens = {"image_token_id": 250, "video_token_id": 251}
    config = Qwen3_5MoeConfig(text_config=moe, vision_config=vision, tie_word_embeddings=tied, **tokens)
    return Qwen3_5MoeForConditionalGeneration, config


def qwen2_audio(**text: Any) -> tuple[Any, Any]:
    """One of the eight classes of 5.23.0 whose plan has no rule for the output head. It never ties."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **_TEXT, **text}, audio_config=audio, audio_token_index=250
    )
    return Qwen2AudioForConditionalGeneration, config


def lfm2(**text: Any) -> tuple[Any, Any]:
    """One of the classes whose plan has a rule for the output head alone, which is tied by default."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return Lfm2ForCausalLM, Lfm2Config(layer_types=["conv", "full_attention"], **{**_TEXT, **text})


def phi3(**text: Any) -> tuple[Any, Any]:
    """Its fused projection is gathered, so that any degree fits."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM, Phi3Config(**{**_TEXT, "pad_token_id": 0, **text})


def olmo2(**text: Any) -> tuple[Any, Any]:
    """Its projections are gathered, since its norms span all heads."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    text.pop("tie_word_embeddings", None)  # off by default, and some releases declare an int and take no bool
    return Olmo2ForCausalLM, Olmo2Config(**{**_TEXT, **text})


def deepseek_v3(**text: Any) -> tuple[Any, Any]:
    """Its attention is whole on every rank; two heads, so that four ranks could not share them."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    latent = {
        **_TEXT,
        "num_attention_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    return DeepseekV3ForCausalLM, DeepseekV3Config(**{**latent, **text})


FAMILIES: dict[str, Callable[..., tuple[Any, Any]]] = {
    family.__name__: family for family in (llama, qwen3_5_moe, qwen2_audio, lfm2, phi3, olmo2, deepseek_v3)
}


def save(folder: Path, family: str, **text: Any) -> Any:
    """Write a random model of a family; its class."""
    import torch

    defaults = {"vocab_size": VOCAB, "num_key_value_heads": 2, "tie_word_embeddings": False}
    cls, config = FAMILIES[family](**{**defaults, **text})
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    return cls


def tp_arguments(degree: int) -> dict[str, Any]:
    """How the release at hand is asked for native tensor parallelism."""
    from transformers import __version__

    from torchtitan_tp_validate.releases.transformers_plans import release

    if release(__version__) < (5, 15):
        return {"tp_plan": "auto"}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=degree)}
