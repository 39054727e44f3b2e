"""Drop-in parallelize functions, a file per model, and the table of all of them."""

from torchtitan_tp_validate.wrappers import (
    deepseek_v3,
    gpt_oss,
    kimi_k2_7,
    llama3,
    llama4,
    muse_glimmer,
    qwen3,
    qwen3_5_moe,
    transformers_backend,
)
from torchtitan_tp_validate.wrappers.target import Target

TARGETS: dict[str, Target] = {
    module.__name__.rpartition(".")[2]: module.TARGET
    for module in (
        llama3,
        llama4,
        qwen3,
        qwen3_5_moe,
        deepseek_v3,
        gpt_oss,
        kimi_k2_7,
        muse_glimmer,
        transformers_backend,
    )
}
"""Wrapper module name -> what it guards."""
