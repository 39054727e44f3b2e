"""The model families of torchtitan, a row each. Everything that lists families reads this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A model family, and where the releases of torchtitan keep it.

    Attributes:
        name: our name of it, which is that of its wrapper module.
        title: the name as its authors write it.
        functions: upstream's names of its parallelize function, one of which a release has; ours of the
            drop-in is the last.
        packages: the packages that define that function, the model's own first; the experiments have copies
            that shard the same dimensions.
        has_moe_title: whether the package holds dense and mixture-of-experts models, told apart by ``-MoE``.
        shares_kv_heads: the lines of torchtitan in which several ranks can share a key-value head of its
            models (``kv_replication``).
        hf_model_types: ``model_type`` of the Hugging Face configs, the outermost of a file, of the models
            that torchtitan 0.3.x has of the family, as the ``state_dict_adapter.py`` files name them.
    """

    name: str
    title: str
    functions: tuple[str, ...]
    packages: tuple[str, ...]
    has_moe_title: bool = False
    shares_kv_heads: tuple[str, ...] = ()
    hf_model_types: tuple[str, ...] = ()

    @property
    def drop_in(self) -> str:
        """Return the name of our drop-in function."""
        return self.functions[-1]

    @property
    def model_packages(self) -> tuple[str, ...]:
        """Return the names under ``torchtitan.models`` that hold its models."""
        prefix = "torchtitan.models."
        return tuple(package.removeprefix(prefix) for package in self.packages if package.startswith(prefix))


_SIMPLE_FSDP = "torchtitan.experiments.simple_fsdp"
_TOOLKIT = "torchtitan.experiments.compiler_toolkit"
_GRAPH_TRAINER = "torchtitan.experiments.graph_trainer"

MODELS = (
    Family(
        "llama3",
        "Llama 3",
        ("parallelize_llama",),
        (
            "torchtitan.models.llama3",
            f"{_SIMPLE_FSDP}.llama3",
            f"{_TOOLKIT}.llama3",
            f"{_GRAPH_TRAINER}.llama3",
        ),
        shares_kv_heads=("0.2", "0.3"),
        hf_model_types=("llama",),
    ),
    Family(
        "llama4",
        "Llama 4",
        ("parallelize_llama",),
        ("torchtitan.models.llama4",),
        shares_kv_heads=("0.2",),
    ),
    Family(
        "qwen3",
        "Qwen3",
        ("parallelize_qwen3",),
        ("torchtitan.models.qwen3", "torchtitan.experiments.rl.unified", f"{_GRAPH_TRAINER}.qwen3"),
        has_moe_title=True,
        shares_kv_heads=("0.2", "0.3"),
        hf_model_types=("qwen3", "qwen3_moe"),
    ),
    Family(
        "qwen3_5_moe",
        "Qwen3.5",
        # 0.3.x; upstream pull request #2545, which the drop-in is named for.
        ("parallelize_qwen3_5", "parallelize_qwen3_5_moe"),
        ("torchtitan.models.qwen3_5", "torchtitan.models.qwen3_5_moe"),
        has_moe_title=True,
        shares_kv_heads=("0.3",),
        hf_model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    ),
    Family(
        "deepseek_v3",
        "DeepSeek-V3",
        ("parallelize_deepseekv3",),
        (
            "torchtitan.models.deepseek_v3",
            f"{_SIMPLE_FSDP}.deepseek_v3",
            f"{_TOOLKIT}.deepseek_v3",
            f"{_GRAPH_TRAINER}.deepseek_v3",
        ),
        hf_model_types=("deepseek_v3",),
    ),
    Family(
        "gpt_oss",
        "gpt-oss",
        ("parallelize_gptoss",),
        ("torchtitan.models.gpt_oss", "torchtitan.experiments.gpt_oss"),
        shares_kv_heads=("0.3",),
        hf_model_types=("gpt_oss",),
    ),
    Family(
        "kimi_k2_7",
        "Kimi K2",
        ("parallelize_kimi_k2_5",),
        ("torchtitan.models.kimi_k2_7",),
        # Of Kimi K3 torchtitan has the vision encoder, which is its elder's.
        hf_model_types=("kimi_k2", "kimi_vl", "kimi_k25", "kimi_k3"),
    ),
    Family(
        "muse_glimmer",
        "Muse Glimmer",
        ("parallelize_muse_glimmer",),
        ("torchtitan.models.muse_glimmer", f"{_GRAPH_TRAINER}.muse_glimmer"),
        shares_kv_heads=("0.3",),
    ),
    Family(
        "transformers_backend",
        "transformers backend",
        ("parallelize_hf_transformers",),
        ("torchtitan.experiments.transformers_modeling_backend",),
    ),
)
"""Every family that torchtitan 0.2.0 to 0.3.0 and the qwen3_5_moe fork register."""

FAMILY_OF = {package: family for family in MODELS for package in family.model_packages}
"""Package under ``torchtitan.models`` -> its family."""


def is_listed(module: str) -> bool:
    """Return whether a module is in a package of one of the families, the experiments' copies included."""
    return any(f"{module}.".startswith(f"{package}.") for family in MODELS for package in family.packages)


def sharing_kv_heads(line: str) -> tuple[str, ...]:
    """Return the packages of the families whose key-value heads several ranks can share in a line."""
    return tuple(family.model_packages[0] for family in MODELS if line in family.shares_kv_heads)


def hf_model_types(*, sharing_kv_heads_in: str = "") -> frozenset[str]:
    """Return the ``model_type`` of the Hugging Face configs of which torchtitan has a model.

    Args:
        sharing_kv_heads_in: only those whose key-value heads several ranks can share in this line.
    """
    return frozenset(
        model_type
        for family in MODELS
        if not sharing_kv_heads_in or sharing_kv_heads_in in family.shares_kv_heads
        for model_type in family.hf_model_types
    )
