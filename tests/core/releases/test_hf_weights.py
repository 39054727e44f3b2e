"""Which runs have the adapter of Llama 3 permute heads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchtitan_tp_validate.releases.hf_weights import permuted_heads

Llama = type("Config", (), {"__module__": "torchtitan.models.llama3.model", "n_heads": 32, "n_kv_heads": 8})
Qwen = type("Config", (), {"__module__": "torchtitan.models.qwen3.model", "n_heads": 32, "n_kv_heads": 8})


def checkpoint(**settings: bool) -> SimpleNamespace:
    flags = {"enable": True, "initial_load_in_hf": False, "last_save_in_hf": False, **settings}
    return SimpleNamespace(folder="checkpoint", **flags)


@pytest.mark.parametrize(
    ("kind", "settings", "heads"),
    [
        (Llama, {"initial_load_in_hf": True}, 8),
        (Llama, {"last_save_in_hf": True}, 8),
        (Llama, {"last_save_in_hf": True, "enable": False}, None),
        (Llama, {}, None),
        (Qwen, {"last_save_in_hf": True}, None),
    ],
)
def test_those_of_a_llama_3_that_loads_or_saves_hugging_face_weights(
    kind: Any, settings: dict[str, bool], heads: int | None, tmp_path: Path
) -> None:
    assert permuted_heads(kind(), kind(), checkpoint(**settings), str(tmp_path)) == heads


def test_query_heads_count_where_there_are_no_others(tmp_path: Path) -> None:
    attention = SimpleNamespace(n_heads=32, n_kv_heads=None)
    assert permuted_heads(Llama(), attention, checkpoint(last_save_in_hf=True), str(tmp_path)) == 32


def test_a_run_that_goes_on_from_its_own_checkpoint_loads_no_initial_weights(tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "step-10").mkdir(parents=True)
    assert permuted_heads(Llama(), Llama(), checkpoint(initial_load_in_hf=True), str(tmp_path)) is None
    assert permuted_heads(Llama(), Llama(), checkpoint(last_save_in_hf=True), str(tmp_path)) == 8


def test_a_run_without_checkpoints_permutes_nothing() -> None:
    assert permuted_heads(Llama(), Llama(), None, "") is None
