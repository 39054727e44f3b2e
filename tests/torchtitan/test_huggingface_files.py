"""A published config.json gets the verdict of torchtitan's own model of it."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from tests.core.releases.published import PUBLISHED
from tests.core.releases.test_huggingface_sizes import DTENSOR
from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.releases import read_plan
from torchtitan_tp_validate.releases.huggingface import Framework, read

pytestmark = pytest.mark.requires(torchtitan="0.3")  # 0.2 has other models

FLAVORS = {
    ("llama3", "8B"): "Llama-3.1-8B",
    ("llama3", "405B"): "Llama-3.1-405B",
    ("qwen3", "0.6B"): "Qwen3-0.6B",
    ("qwen3", "32B"): "Qwen3-32B",
    ("qwen3", "30B-A3B"): "Qwen3-30B-A3B",
    ("qwen3_5", "9B"): "Qwen3.5-9B",
    ("qwen3_5", "27B"): "Qwen3.5-27B",
    ("qwen3_5", "35B-A3B"): "Qwen3.5-35B-A3B",
    ("deepseek_v3", "671B"): "DeepSeek-V3",
    ("gpt_oss", "20b"): "gpt-oss-20b",
    ("kimi_k2_7", "moonlight-16B-A3B"): "Moonlight-16B-A3B",
    ("kimi_k2_7", "Kimi-VL-A3B"): "Kimi-VL-A3B",
    ("kimi_k2_7", "Kimi-K2.5"): "Kimi-K2.5",
}


@pytest.mark.parametrize(("module", "flavor"), FLAVORS)
def test_a_file_gets_the_verdict_of_torchtitans_own_model(module: str, flavor: str) -> None:
    own = importlib.import_module(f"torchtitan.models.{module}").model_registry(flavor).model
    file = PUBLISHED[FLAVORS[module, flavor]].config
    for backend in ("spmd_types", DTENSOR, "full_dtensor"):
        for ep in (1, 2):
            degrees = Degrees(tp=2, ep=ep, cp=2, seq_len=4096, spmd_backend=backend)
            expected = read_plan(own, degrees)
            found = read(file, file, degrees, framework=Framework.TORCHTITAN)
            assert found.valid_degrees() == expected.valid_degrees(), (backend, ep)
            assert found.valid_degrees(Axis.EP) == expected.valid_degrees(Axis.EP), (backend, ep)
            rules = {dim.code for dim in expected.dims}
            assert {dim.code for dim in found.dims} == rules, (backend, ep)
            wanted = replace(degrees, replicate_kv_heads=True)
            assert (
                read(file, file, wanted, framework=Framework.TORCHTITAN).valid_degrees()
                == read_plan(own, wanted).valid_degrees()
            ), (backend, ep)
