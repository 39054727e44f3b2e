"""What replication refuses in both torchtitan lines alike, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import torchtitan_tp_validate as tpv

_PERMUTED = """\
KV-head replication is not supported here: checkpoint.{flag} = true permutes wk by whole heads, and a rank \
holds a part of one.
Without this check the run would die {when} step with "Cannot unflatten unevenly sharded tensor".
What works: {flag} = false with torchtitan's scripts/checkpoint_conversion before or after the run, or a \
tensor parallel degree that divides n_kv_heads without --replicate-kv-heads."""

PERMUTED = {
    flag: _PERMUTED.format(flag=flag, when=when)
    for flag, when in (("initial_load_in_hf", "before its first"), ("last_save_in_hf", "after its last"))
}
"""Setting of ``[checkpoint]`` -> why it does not go with a Llama 3 whose ranks share heads."""


def assert_refuses_permuted_weights(
    start: Callable[[str, str, int], object], flag: str, dump_folder: Path
) -> None:
    """Start runs of a model, flavor and TP degree whose ``[checkpoint]`` sets the flag."""
    with pytest.raises(tpv.KVReplicationError) as caught:
        start("llama3", "8B", 16)
    assert str(caught.value) == PERMUTED[flag]
    start("llama3", "8B", 8)
    start("qwen3", "0.6B", 16)
    # A run that goes on from its own checkpoint does not load initial weights.
    (dump_folder / "checkpoint" / "step-10").mkdir(parents=True)
    with nullcontext() if flag == "initial_load_in_hf" else pytest.raises(tpv.KVReplicationError):
        start("llama3", "8B", 16)
