"""Which runs have the adapter of Llama 3 permute heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchtitan_tp_validate.releases.checkpoints import Start
from torchtitan_tp_validate.releases.hf_weights import permuted_heads, saves_transposed_experts

Llama = type("Config", (), {"__module__": "torchtitan.models.llama3.model", "n_heads": 32, "n_kv_heads": 8})
Qwen = type("Config", (), {"__module__": "torchtitan.models.qwen3.model", "n_heads": 32, "n_kv_heads": 8})
IN_HF, IN_DCP = Start("weights", in_hf=True), Start("checkpoint/step-10", model_only=False)


def checkpoint(*, saves: bool, enable: bool = True) -> SimpleNamespace:
    return SimpleNamespace(enable=enable, last_save_in_hf=saves)


@pytest.mark.parametrize(
    ("kind", "start", "section", "heads"),
    [
        (Llama, IN_HF, checkpoint(saves=False), 8),
        (Llama, None, checkpoint(saves=True), 8),
        (Llama, IN_DCP, checkpoint(saves=True), 8),
        (Llama, IN_DCP, checkpoint(saves=False), None),
        (Llama, None, checkpoint(saves=True, enable=False), None),
        (Llama, None, checkpoint(saves=False), None),
        (Llama, None, None, None),
        (Qwen, None, checkpoint(saves=True), None),
    ],
)
def test_those_of_a_llama_3_that_loads_or_saves_hugging_face_weights(
    kind: Any, start: Start | None, section: Any, heads: int | None
) -> None:
    assert permuted_heads(kind(), kind(), section, start) == heads


@pytest.mark.parametrize(
    ("package", "section", "saves"),
    [
        ("llama4.model.args", checkpoint(saves=True), True),
        ("qwen3_5.model", checkpoint(saves=True), True),
        ("qwen3_5.model", checkpoint(saves=False), False),
        ("qwen3_5.model", checkpoint(saves=True, enable=False), False),
        ("qwen3_5.model", None, False),
        ("deepseek_v3.model", checkpoint(saves=True), False),
    ],
)
def test_the_experts_of_llama_4_and_qwen3_5_are_transposed(package: str, section: Any, saves: bool) -> None:
    config = type("Config", (), {"__module__": f"torchtitan.models.{package}"})()
    assert saves_transposed_experts(config, section) is saves


def test_query_heads_count_where_there_are_no_others() -> None:
    attention = SimpleNamespace(n_heads=32, n_kv_heads=None)
    assert permuted_heads(Llama(), attention, checkpoint(saves=True), None) == 32
