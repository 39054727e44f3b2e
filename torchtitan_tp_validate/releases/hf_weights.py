"""Which runs have torchtitan's Hugging Face adapter permute the rows of each head of wq and wk.

Source: ``models/llama3/**/state_dict_adapter.py`` of torchtitan. The adapters of its other models permute no
rows, or gather them first (muse_glimmer).
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.releases.checkpoints import Start
from torchtitan_tp_validate.releases.kv_replication import class_name

_ADAPTED = "torchtitan.models.llama3."


def permuted_heads(config: Any, attention: Any, checkpoint: Any, start: Start | None) -> int | None:
    """Return the key-value heads whose rows are permuted as a run loads or saves, or None where none are.

    Args:
        config: the model's args (0.2.x) or config (0.3.x).
        attention: what tells the head counts of its first layer, which the adapter goes by.
        checkpoint: the run's ``[checkpoint]``, or None.
        start: what the run starts from.
    """
    if checkpoint is None or not checkpoint.enable or not class_name(config).startswith(_ADAPTED):
        return None
    if checkpoint.last_save_in_hf or (start is not None and start.in_hf):
        heads: int = attention.n_kv_heads or attention.n_heads
        return heads
    return None
