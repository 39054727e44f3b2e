"""Head counts that model makers published in their config.json, and the TP degrees that they allow.

Each entry is what such a file says about heads and sizes, shortened to that. The degrees were worked out by
hand, from the counts in the second column: they are the common divisors of all of them. Where torchtitan has
a model of the family, its feed-forward, expert, vocabulary and vision sizes count too; those that matter are
named in a comment.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    """One published file.

    Attributes:
        heads: query / key-value heads, of every kind of layer, as its maker describes them.
        degrees: the TP degrees that work by torchtitan's rule.
        config: the file.
    """

    heads: str
    degrees: str
    config: dict[str, Any]


def of(model_type: str, n_heads: int, n_kv_heads: int | None, n_layers: int, **more: Any) -> dict[str, Any]:
    """A file with the usual names."""
    counts: dict[str, Any] = {"num_attention_heads": n_heads, "num_hidden_layers": n_layers}
    if n_kv_heads is not None:
        counts["num_key_value_heads"] = n_kv_heads
    return {"model_type": model_type, **counts, **more}


def llama(
    n_heads: int, n_kv_heads: int | None, n_layers: int, ffn: int, vocab: int, head_dim: int = 128
) -> dict[str, Any]:
    sizes = {"hidden_size": n_heads * head_dim, "intermediate_size": ffn, "vocab_size": vocab}
    return of("llama", n_heads, n_kv_heads, n_layers, **sizes)


def qwen3(n_heads: int, n_kv_heads: int, n_layers: int, ffn: int) -> dict[str, Any]:
    sizes = {"head_dim": 128, "intermediate_size": ffn, "vocab_size": 151936}
    return of("qwen3", n_heads, n_kv_heads, n_layers, **sizes)


def qwen3_moe(n_heads: int, n_layers: int, ffn: int) -> dict[str, Any]:
    sizes = {"moe_intermediate_size": ffn, "num_experts": 128, "vocab_size": 151936, "head_dim": 128}
    unused = {"intermediate_size": 4 * 12345, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return of("qwen3_moe", n_heads, 4, n_layers, **sizes, **unused)


def qwen3_5(n_heads: int, n_kv_heads: int, n_layers: int, values: int, **ffn: int) -> dict[str, Any]:
    kind = "qwen3_5_moe" if "num_experts" in ffn else "qwen3_5"
    text = of(
        f"{kind}_text",
        n_heads,
        n_kv_heads,
        n_layers,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (n_layers // 4),
        linear_num_key_heads=16,
        linear_num_value_heads=values,
        vocab_size=248320,
        head_dim=256,
        initializer_range=0.02,
        **ffn,
    )
    vision = {"depth": 27, "num_heads": 16, "hidden_size": 1152, "intermediate_size": 4304}
    return {"model_type": kind, "text_config": text, "vision_config": {**vision, "spatial_merge_size": 2}}


def latent(model_type: str, n_heads: int, n_layers: int, **more: Any) -> dict[str, Any]:
    """Multi-head latent attention: key-value heads are named, and are none."""
    return of(model_type, n_heads, n_heads, n_layers, kv_lora_rank=512, **more)


DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 129280,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
}
KIMI = {**DEEPSEEK_V3, "vocab_size": 163840, "n_routed_experts": 384, "first_k_dense_replace": 1}
MOONLIGHT = {
    **KIMI,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
}
MOONVIT = {"num_attention_heads": 16, "hidden_size": 1152, "intermediate_size": 4304}
MOONVIT_K25 = {"vt_num_attention_heads": 16, "vt_hidden_size": 1152, "vt_intermediate_size": 4304}

_2 = "1 2"
_4 = "1 2 4"
_8 = "1 2 4 8"
_16 = "1 2 4 8 16"
_32 = "1 2 4 8 16 32"
_64 = "1 2 4 8 16 32 64"
_128 = "1 2 4 8 16 32 64 128"
_12 = "1 2 3 4 6 12"
_20 = "1 2 4 5 10 20"
_40 = "1 2 4 5 8 10 20 40"

PUBLISHED: dict[str, Published] = {
    # Llama. Its feed-forward of 13824 is no multiple of 5, that of 17920 none of 13.
    "llama-13b": Published("40/40", _8, llama(40, None, 40, 13824, 32000)),
    "llama-30b": Published("52/52", _4, llama(52, None, 60, 17920, 32000)),
    "Llama-2-7b": Published("32/32", _32, llama(32, 32, 32, 11008, 32000)),
    "Llama-2-70b": Published("64/8", _8, llama(64, 8, 80, 28672, 32000)),
    "Llama-3.1-8B": Published("32/8", _8, llama(32, 8, 32, 14336, 128256)),
    "Llama-3.1-405B": Published("128/8", _8, llama(128, 8, 126, 53248, 128256)),
    "Llama-3.2-3B": Published("24/8", _8, llama(24, 8, 28, 8192, 128256)),
    "Llama-4-Scout": Published(
        "40/8",
        _8,
        {
            "model_type": "llama4",
            "text_config": of("llama4_text", 40, 8, 48, num_local_experts=16),
            "vision_config": {"num_attention_heads": 16},
        },
    ),
    "Yi-6B": Published("32/4", _4, llama(32, 4, 32, 11008, 64000)),
    "Yi-34B": Published("56/8", _8, llama(56, 8, 60, 20480, 64000)),
    "SmolLM2-135M": Published("9/3", "1 3", llama(9, 3, 30, 1536, 49152, 64)),
    "TinyLlama-1.1B": Published("32/4", _4, llama(32, 4, 22, 5632, 32000, 64)),
    "deepseek-llm-67b": Published("64/8", _8, llama(64, 8, 95, 22016, 102400)),
    # Qwen
    "Qwen-7B": Published("32/32", _32, of("qwen", 32, None, 32, kv_channels=128)),
    "Qwen1.5-4B": Published("20/20", _20, of("qwen2", 20, 20, 40)),
    "Qwen2-0.5B": Published("14/2", _2, of("qwen2", 14, 2, 24)),
    "Qwen2-57B-A14B": Published("28/4", _4, of("qwen2_moe", 28, 4, 28, num_experts=64)),
    "Qwen2.5-7B": Published("28/4", _4, of("qwen2", 28, 4, 28)),
    "Qwen2.5-32B": Published("40/8", _8, of("qwen2", 40, 8, 64)),
    "Qwen2.5-VL-7B": Published("28/4", _4, of("qwen2_5_vl", 28, 4, 28, vision_config={"num_heads": 16})),
    "Qwen3-0.6B": Published("16/8", _8, qwen3(16, 8, 28, 3072)),
    "Qwen3-32B": Published("64/8", _8, qwen3(64, 8, 64, 25600)),
    "Qwen3-30B-A3B": Published("32/4", _4, qwen3_moe(32, 48, 768)),
    "Qwen3-235B-A22B": Published("64/4", _4, qwen3_moe(64, 94, 1536)),
    "Qwen3-Next-80B-A3B": Published(
        "16/2 and linear 16/32",
        _2,
        of(
            "qwen3_next",
            16,
            2,
            48,
            full_attention_interval=4,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
        ),
    ),
    "Qwen3.5-9B": Published(
        "16/4, linear 16/32, vision 16", _4, qwen3_5(16, 4, 32, 32, intermediate_size=12288)
    ),
    "Qwen3.5-27B": Published(
        "24/4, linear 16/48, vision 16", _4, qwen3_5(24, 4, 64, 48, intermediate_size=17408)
    ),
    "Qwen3.5-35B-A3B": Published(
        "16/2, linear 16/32, vision 16",
        _2,
        qwen3_5(
            16,
            2,
            40,
            32,
            num_experts=256,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
    ),
    # Mistral
    "Mistral-7B": Published("32/8", _8, of("mistral", 32, 8, 32)),
    "Mistral-Large-2407": Published("96/8", _8, of("mistral", 96, 8, 88)),
    "Mixtral-8x7B": Published("32/8", _8, of("mixtral", 32, 8, 32, num_local_experts=8)),
    "Mixtral-8x22B": Published("48/8", _8, of("mixtral", 48, 8, 56, num_local_experts=8)),
    # Gemma
    "gemma-2b": Published("8/1", "1", of("gemma", 8, 1, 18)),
    "gemma-7b": Published("16/16", _16, of("gemma", 16, 16, 28)),
    "gemma-2-9b": Published("16/8", _8, of("gemma2", 16, 8, 42)),
    "gemma-2-27b": Published("32/16", _16, of("gemma2", 32, 16, 46)),
    "gemma-3-1b": Published("4/1", "1", of("gemma3_text", 4, 1, 26)),
    "gemma-3-27b": Published(
        "32/16",
        _16,
        {
            "model_type": "gemma3",
            "text_config": of("gemma3_text", 32, 16, 62),
            "vision_config": {"num_attention_heads": 16},
        },
    ),
    "gemma-3n-E4B": Published(
        "8/2", _2, {"model_type": "gemma3n", "text_config": of("gemma3n_text", 8, 2, 35)}
    ),
    "gemma-4-31B": Published(
        "32/16, and 32/4 in every sixth layer",
        _4,
        {
            "model_type": "gemma4",
            "text_config": of(
                "gemma4_text",
                32,
                16,
                60,
                layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 10,
                num_global_key_value_heads=4,
                attention_k_eq_v=True,
            ),
        },
    ),
    # Phi
    "phi-2": Published("32/32", _32, of("phi", 32, None, 32)),
    "Phi-3-mini-4k": Published("32/32", _32, of("phi3", 32, 32, 32)),
    "phi-4": Published("40/10", "1 2 5 10", of("phi3", 40, 10, 40)),
    "Phi-4-mini": Published("24/8", _8, of("phi3", 24, 8, 32)),
    "Phi-3.5-MoE": Published("32/8", _8, of("phimoe", 32, 8, 32, num_local_experts=16)),
    # DeepSeek and Kimi
    "DeepSeek-V2": Published("128, latent", _128, latent("deepseek_v2", 128, 60)),
    "DeepSeek-V2-Lite": Published("16, latent", _16, latent("deepseek_v2", 16, 27)),
    "DeepSeek-V3": Published("128, latent", _128, latent("deepseek_v3", 128, 61, **DEEPSEEK_V3)),
    "deepseek-vl2-tiny": Published(
        "10/10, a latent rank of no use",
        "1 2 5 10",
        {
            "model_type": "deepseek_vl_v2",
            "language_config": of("deepseek_v2", 10, 10, 12, use_mla=False, kv_lora_rank=512),
            "vision_config": {"model_type": "vision"},
        },
    ),
    "Moonlight-16B-A3B": Published("16, latent", _16, latent("deepseek_v3", 16, 27, **MOONLIGHT)),
    "Kimi-K2-Instruct": Published("64, latent", _64, latent("kimi_k2", 64, 61, **KIMI)),
    "Kimi-K2.5": Published(
        "64, latent, vision 16",
        _16,
        {
            "model_type": "kimi_k25",
            "text_config": latent("kimi_k2", 64, 61, **KIMI),
            "vision_config": {**MOONVIT_K25, "merge_kernel_size": [2, 2]},
        },
    ),
    "Kimi-VL-A3B": Published(
        "16, latent, vision 16",
        _16,
        {
            "model_type": "kimi_vl",
            "text_config": latent("deepseek_v3", 16, 27, **MOONLIGHT),
            "vision_config": {"model_type": "moonvit", **MOONVIT, "merge_kernel_size": [2, 2]},
        },
    ),
    "Kimi-Linear-48B-A3B": Published(
        "32, latent, and linear 32/32",
        _32,
        latent(
            "kimi_linear",
            32,
            27,
            linear_attn_config={"num_heads": 32, "full_attn_layers": [4, 8, 12, 16, 20, 24, 27]},
        ),
    ),
    # OpenAI
    "gpt-oss-20b": Published(
        "64/8",
        _8,
        of(
            "gpt_oss", 64, 8, 24, num_local_experts=32, intermediate_size=2880, vocab_size=201088, head_dim=64
        ),
    ),
    "gpt2": Published("12/12", _12, {"model_type": "gpt2", "n_head": 12, "n_layer": 12}),
    "gpt2-xl": Published("25/25", "1 5 25", {"model_type": "gpt2", "n_head": 25, "n_layer": 48}),
    "whisper-large-v3": Published(
        "20/20",
        _20,
        {
            "model_type": "whisper",
            "decoder_attention_heads": 20,
            "encoder_attention_heads": 20,
            "decoder_layers": 32,
            "num_hidden_layers": 32,
        },
    ),
    # GLM
    "chatglm-6b": Published(
        "32/32", _32, {"model_type": "chatglm", "num_attention_heads": 32, "num_layers": 28}
    ),
    "glm-4-9b-chat": Published(
        "32/2",
        _2,
        {
            "model_type": "chatglm",
            "num_attention_heads": 32,
            "num_layers": 40,
            "kv_channels": 128,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
        },
    ),
    "GLM-4-9B-0414": Published("32/2", _2, of("glm4", 32, 2, 40)),
    "GLM-4.5": Published("96/8", _8, of("glm4_moe", 96, 8, 92, n_group=1, topk_group=1)),
    # Granite, OLMo, Cohere, Databricks, AI21, NVIDIA
    "granite-3.1-8b": Published("32/8", _8, of("granite", 32, 8, 40)),
    "granite-34b-code": Published(
        "48/1", "1", {"model_type": "gpt_bigcode", "n_head": 48, "n_layer": 88, "multi_query": True}
    ),
    "granite-4.0-h-small": Published(
        "32/8 in 4 layers",
        _8,
        of(
            "granitemoehybrid",
            32,
            8,
            40,
            layer_types=(["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
            mamba_n_heads=128,
            mamba_n_groups=1,
        ),
    ),
    "OLMo-7B": Published("32/32", _32, of("olmo", 32, 32, 32)),
    "OLMo-2-13B": Published("40/40", _40, of("olmo2", 40, 40, 40)),
    "OLMo-2-32B": Published("40/8", _8, of("olmo2", 40, 8, 64)),
    "OLMoE-1B-7B": Published("16/16", _16, of("olmoe", 16, 16, 16, num_experts=64)),
    "c4ai-command-r-v01": Published("64/64", _64, of("cohere", 64, 64, 40)),
    "c4ai-command-r-plus": Published("96/8", _8, of("cohere", 96, 8, 64)),
    "dbrx-base": Published(
        "48/8",
        _8,
        {
            "model_type": "dbrx",
            "n_heads": 48,
            "n_layers": 40,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8},
        },
    ),
    "Jamba-v0.1": Published(
        "32/8 in 4 layers", _8, of("jamba", 32, 8, 32, attn_layer_period=8, attn_layer_offset=4)
    ),
    "Nemotron-4-340B": Published("96/8", _8, of("nemotron", 96, 8, 96)),
    "Nemotron-H-8B": Published(
        "32/8 in 4 layers",
        _8,
        of(
            "nemotron_h",
            32,
            8,
            52,
            hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            n_groups=8,
            mamba_num_heads=128,
        ),
    ),
    "Llama-3_1-Nemotron-51B": Published(
        "64/8, 64/4 or none",
        _4,
        {
            "model_type": "nemotron-nas",
            "num_attention_heads": 64,
            "num_hidden_layers": 3,
            "block_configs": [
                {"attention": {"n_heads_in_group": 8}},
                {"attention": {"n_heads_in_group": None, "no_op": True}},
                {"attention": {"n_heads_in_group": 16}},
            ],
        },
    ),
    # MiniMax, Hunyuan, ERNIE, InternLM, Baichuan, Xiaomi, StepFun, inclusionAI
    "MiniMax-M2": Published("48/8", _8, of("minimax_m2", 48, 8, 62, num_local_experts=256)),
    "MiniMax-Text-01": Published(
        "64/8, linear 64",
        _8,
        of("minimax_text_01", 64, 8, 80, attn_type_list=([0] * 7 + [1]) * 10),
    ),
    "Hunyuan-A13B": Published(
        "32/8", _8, of("hunyuan_v1_moe", 32, 8, 32, use_mla=False, kv_lora_rank=None, num_experts=64)
    ),
    "ERNIE-4.5-0.3B": Published("16/2", _2, of("ernie4_5", 16, 2, 18)),
    "ERNIE-4.5-21B-A3B": Published("20/4", _4, of("ernie4_5_moe", 20, 4, 28, moe_num_experts=64)),
    "internlm-7b": Published("32/32", _32, of("internlm", 32, None, 32)),
    "internlm2-20b": Published("48/8", _8, of("internlm2", 48, 8, 48)),
    "InternVL2_5-8B": Published(
        "32/8",
        _8,
        {
            "model_type": "internvl_chat",
            "llm_config": of("internlm2", 32, 8, 32, initializer_range=0.02),
            "vision_config": {"num_attention_heads": 16},
        },
    ),
    "Baichuan2-7B": Published("32/32", _32, of("baichuan", 32, None, 32)),
    "Baichuan2-13B": Published("40/40", _40, of("baichuan", 40, None, 40)),
    "MiMo-7B": Published("32/8", _8, of("mimo", 32, 8, 36)),
    "MiMo-V2-Flash": Published(
        "64/4, and 64/8 in sliding layers",
        _4,
        of(
            "mimo_v2_flash",
            64,
            4,
            48,
            hybrid_layer_pattern=[0, *([1, 1, 1, 1, 0] * 1), *([1, 1, 1, 1, 1, 0] * 7)],
            swa_num_attention_heads=64,
            swa_num_key_value_heads=8,
            n_routed_experts=256,
            n_group=1,
            topk_group=1,
        ),
    ),
    "Step-3.5-Flash": Published(
        "64/8, and 96/8 in sliding layers",
        _8,
        {
            "model_type": "step3p5",
            "num_attention_heads": 64,
            "num_attention_groups": 8,
            "num_hidden_layers": 45,
            "num_nextn_predict_layers": 3,
            "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 12,
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 96,
                "num_attention_groups": 8,
                "head_dim": 128,
            },
            "moe_num_experts": 288,
        },
    ),
    "Ling-lite": Published("16/4", _4, of("bailing_moe", 16, 4, 28, num_experts=64)),
    # BigScience, EleutherAI, Meta, Google
    "bloom": Published(
        "112/112",
        "1 2 4 7 8 14 16 28 56 112",
        {"model_type": "bloom", "num_attention_heads": 112, "n_layer": 70},
    ),
    "bloom-560m": Published("16/16", _16, {"model_type": "bloom", "n_head": 16, "n_layer": 24}),
    "gpt-j-6b": Published("16/16", _16, {"model_type": "gptj", "n_head": 16, "n_layer": 28}),
    "gpt-neo-2.7B": Published("20/20", _20, {"model_type": "gpt_neo", "num_heads": 20, "num_layers": 32}),
    "gpt-neox-20b": Published("64/64", _64, of("gpt_neox", 64, None, 44)),
    "pythia-12b": Published("40/40", _40, of("gpt_neox", 40, None, 36)),
    "opt-13b": Published("40/40", _40, of("opt", 40, None, 40)),
    "opt-66b": Published("72/72", "1 2 3 4 6 8 9 12 18 24 36 72", of("opt", 72, None, 64)),
    "t5-base": Published(
        "12/12",
        _12,
        {"model_type": "t5", "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12, "d_kv": 64},
    ),
    "bert-base-uncased": Published("12/12", _12, of("bert", 12, None, 12)),
    "albert-base-v2": Published(
        "12/12", _12, of("albert", 12, None, 12, num_hidden_groups=1, inner_group_num=1)
    ),
    "bart-large": Published(
        "16/16",
        _16,
        {
            "model_type": "bart",
            "decoder_attention_heads": 16,
            "encoder_attention_heads": 16,
            "decoder_layers": 12,
        },
    ),
    "xglm-7.5B": Published("32/32", _32, {"model_type": "xglm", "attention_heads": 32, "num_layers": 32}),
    "recurrentgemma-2b": Published(
        "10/1 in every third layer",
        "1",
        of("recurrent_gemma", 10, 1, 26, block_types=["recurrent", "recurrent", "attention"]),
    ),
    # Falcon, under each of its names
    "falcon-7b": Published(
        "71/1",
        "1",
        of("falcon", 71, None, 32, num_kv_heads=71, multi_query=True, new_decoder_architecture=False),
    ),
    "falcon-7b (RefinedWebModel)": Published(
        "71/1", "1", {"model_type": "RefinedWebModel", "n_head": 71, "n_layer": 32, "multi_query": True}
    ),
    "falcon-40b": Published(
        "128/8",
        _8,
        of("falcon", 128, None, 60, num_kv_heads=8, multi_query=True, new_decoder_architecture=True),
    ),
    "falcon-40b (RefinedWeb)": Published(
        "128/8", _8, {"model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60}
    ),
    "falcon-180B": Published(
        "232/8",
        _8,
        of("falcon", 232, None, 80, num_kv_heads=8, multi_query=True, new_decoder_architecture=True),
    ),
    "falcon-rw-1b": Published("32/32", _32, of("falcon", 32, None, 24, multi_query=False)),
    # Code models
    "starcoder": Published(
        "48/1", "1", {"model_type": "gpt_bigcode", "n_head": 48, "n_layer": 40, "multi_query": True}
    ),
    "starcoder2-15b": Published("48/4", _4, of("starcoder2", 48, 4, 40)),
    "santacoder": Published(
        "16/1",
        "1",
        {"model_type": "gpt2", "n_head": 16, "n_layer": 24, "attention_head_type": "multiquery"},
    ),
    "codeshell-7b": Published(
        "32/8",
        _8,
        {
            "model_type": "codeshell",
            "n_head": 32,
            "n_layer": 42,
            "group_query_attention": True,
            "num_query_groups": 8,
        },
    ),
    # Names of their own
    "plamo-13b": Published("40/5", "1 5", of("plamo", 40, None, 40, n_shared_head=8)),
    "cogvlm2-llama3-chat-19B": Published(
        "32/8",
        _8,
        {
            "num_attention_heads": 32,
            "num_multi_query_heads": 8,
            "num_hidden_layers": 32,
            "vision_config": {"num_heads": 16, "num_hidden_layers": 63},
        },
    ),
    "StripedHyena-Nous-7B": Published(
        "32/8 in every second layer",
        _8,
        {
            "model_type": "stripedhyena",
            "num_attention_heads": 32,
            "num_layers": 32,
            "proj_groups": 4,
            "attn_layer_idxs": list(range(1, 32, 2)),
            "hyena_layer_idxs": list(range(0, 32, 2)),
            "hyena_filter_groups": 1,
        },
    ),
    "mpt-7b": Published(
        "32/32",
        _32,
        {
            "model_type": "mpt",
            "n_heads": 32,
            "n_layers": 32,
            "attn_config": {"attn_type": "multihead_attention", "qk_ln": False},
        },
    ),
    "mpt of one key-value head": Published(
        "16/1",
        "1",
        {
            "model_type": "mpt",
            "n_heads": 16,
            "n_layers": 24,
            "attn_config": {"attn_type": "multiquery_attention"},
        },
    ),
    "replit-code-v1_5-3b": Published(
        "24/8",
        _8,
        {
            "model_type": "mpt",
            "n_heads": 24,
            "n_layers": 32,
            "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 8},
        },
    ),
    "OpenELM-270M": Published(
        "12/3, 16/4 and 20/5",
        "1",
        {
            "model_type": "openelm",
            "num_transformer_layers": 16,
            "num_query_heads": [12] * 5 + [16] * 7 + [20] * 4,
            "num_kv_heads": [3] * 5 + [4] * 7 + [5] * 4,
        },
    ),
    "fla gated_deltanet, hybrid": Published(
        "16/4 in 4 layers, linear 6/6",
        _2,
        {
            "model_type": "gated_deltanet",
            "num_heads": 6,
            "num_hidden_layers": 21,
            "attn": {"layers": [5, 11, 17, 20], "num_heads": 16, "num_kv_heads": 4, "window_size": 2048},
        },
    ),
    "fla samba": Published(
        "18/18 in every second layer",
        "1 2 3 6 9 18",
        {
            "model_type": "samba",
            "num_hidden_layers": 18,
            "attn": {"layers": list(range(1, 18, 2)), "num_heads": 18, "num_kv_heads": 18},
            "state_size": 16,
        },
    ),
    "stablelm-2-12b": Published("32/8", _8, of("stablelm", 32, 8, 40)),
    "MiniCPM3-4B": Published("40, latent", _40, of("minicpm3", 40, 40, 62, kv_lora_rank=256)),
    "LFM2-1.2B": Published(
        "32/8 in 6 layers",
        _8,
        of(
            "lfm2",
            32,
            8,
            16,
            layer_types=["conv", "conv", "full_attention"] * 5 + ["full_attention"],
        ),
    ),
    "grok-1": Published("48/8", _8, of("grok-1", 48, 8, 64, num_experts=8)),
    "snowflake-arctic": Published("56/8", _8, of("arctic", 56, 8, 35, num_local_experts=128)),
    "EXAONE-3.5-7.8B": Published(
        "32/8",
        _8,
        {"model_type": "exaone", "num_attention_heads": 32, "num_key_value_heads": 8, "num_layers": 32},
    ),
    "Seed-OSS-36B": Published("80/8", _8, of("seed_oss", 80, 8, 64)),
    "persimmon-8b": Published("64/64", _64, of("persimmon", 64, None, 36)),
    "SmolLM3-3B": Published("16/4", _4, of("smollm3", 16, 4, 36)),
}

NOT_A_MODEL_OF_HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "mamba-2.8b-hf": (
        {"model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16},
        "mamba has no attention heads.",
    ),
    "falcon-mamba-7b": (
        {"model_type": "falcon_mamba", "num_hidden_layers": 64, "state_size": 16},
        "falcon_mamba has no attention heads.",
    ),
    "mamba2-1.3b": (
        {"model_type": "mamba2", "num_heads": 64, "num_hidden_layers": 48, "n_groups": 1},
        "mamba2 has no attention heads.",
    ),
    "mamba-130m, the original": (
        {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True},
        "this model is a state-space model, which has no attention heads.",
    ),
    "rwkv-4": ({"model_type": "rwkv", "num_hidden_layers": 24}, "rwkv has no attention heads."),
    "adapter_config.json": (
        {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "r": 8},
        "this is the config of a PEFT adapter, not of a model: judge that of its base model, "
        "'meta-llama/Llama-2-7b-hf'.",
    ),
    "tsconfig.json": (
        {"compilerOptions": {"target": "es2020", "strict": True}, "include": ["src"]},
        "this is not the config of a model: it has no model_type, and no num_attention_heads "
        "(nor n_head, n_heads, num_heads).",
    ),
    "a version": (
        {"version": 1},
        "this is not the config of a model: it has no model_type, and no num_attention_heads "
        "(nor n_head, n_heads, num_heads).",
    ),
    "generation_config.json": (
        {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.31.0"},
        "this is not the config of a model: it has no model_type, and no num_attention_heads "
        "(nor n_head, n_heads, num_heads).",
    ),
    "llava-1.5-7b, without its defaults": (
        {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}},
        "the config has no text_config.num_attention_heads (nor n_head, n_heads, num_heads). "
        "A file that older transformers wrote leaves out what equals the class's default: save it again.",
    ),
}
"""Files without a single head, or no configs at all, and what is to be said of them."""
