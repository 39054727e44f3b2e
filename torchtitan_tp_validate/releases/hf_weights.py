"""Which runs have torchtitan's Hugging Face adapter permute the rows of each head of wq and wk.

Source: ``models/llama3/**/state_dict_adapter.py`` of torchtitan. The adapters of its other models permute no
rows, or gather them first (muse_glimmer).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtitan_tp_validate.releases.kv_replication import class_name

_ADAPTED = "torchtitan.models.llama3."


def permuted_heads(config: Any, attention: Any, checkpoint: Any, dump_folder: str) -> int | None:
    """Return the key-value heads whose rows are permuted as a run loads or saves, or None where none are.

    Args:
        config: the model's args (0.2.x) or config (0.3.x).
        attention: what tells the head counts of its first layer, which the adapter goes by.
        checkpoint: the run's ``[checkpoint]``, or None.
        dump_folder: where it keeps its checkpoints. One of its own is loaded in the place of initial weights.
    """
    if checkpoint is None or not checkpoint.enable or not class_name(config).startswith(_ADAPTED):
        return None
    resumes = any(Path(dump_folder, checkpoint.folder).glob("step-*"))
    if checkpoint.last_save_in_hf or (checkpoint.initial_load_in_hf and not resumes):
        heads: int = attention.n_kv_heads or attention.n_heads
        return heads
    return None
