"""Which runs have torchtitan's Hugging Face adapter do to weights what torch or safetensors then refuses.

Source: ``models/*/**/state_dict_adapter.py`` of torchtitan. That of Llama 3 permutes the rows of each head of
wq and wk; the others permute no rows, or gather them first (muse_glimmer). Those of Llama 4 and Qwen3.5
transpose the weights of experts.
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.releases.checkpoints import Start
from torchtitan_tp_validate.releases.kv_replication import class_name

_PERMUTED = "torchtitan.models.llama3."
_TRANSPOSED = ("torchtitan.models.llama4.", "torchtitan.models.qwen3_5.")


def permuted_heads(config: Any, attention: Any, checkpoint: Any, start: Start | None) -> int | None:
    """Return the key-value heads whose rows are permuted as a run loads or saves, or None where none are.

    Args:
        config: the model's args (0.2.x) or config (0.3.x).
        attention: what tells the head counts of its first layer, which the adapter goes by.
        checkpoint: the run's ``[checkpoint]``, or None.
        start: what the run starts from.
    """
    if checkpoint is None or not checkpoint.enable or not class_name(config).startswith(_PERMUTED):
        return None
    if checkpoint.last_save_in_hf or (start is not None and start.in_hf):
        heads: int = attention.n_kv_heads or attention.n_heads
        return heads
    return None


def saves_transposed_experts(config: Any, checkpoint: Any) -> bool:
    """Return whether a run saves Hugging Face weights of a model whose experts are transposed for it.

    Args:
        config: the model's args (0.2.x) or config (0.3.x).
        checkpoint: the run's ``[checkpoint]``, or None.
    """
    saves = checkpoint is not None and checkpoint.enable and checkpoint.last_save_in_hf
    return bool(saves) and class_name(config).startswith(_TRANSPOSED)
