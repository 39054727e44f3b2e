"""The table of families, and what must agree with it."""

from __future__ import annotations

import importlib
from pathlib import Path

import torchtitan_tp_validate
from torchtitan_tp_validate.models import FAMILY_OF, MODELS, hf_model_types

WRAPPERS = Path(torchtitan_tp_validate.__file__).parent / "wrappers"
NOT_A_FAMILY = {"__init__", "guard"}


def test_every_family_has_a_wrapper_of_its_own_and_every_wrapper_a_family() -> None:
    modules = {path.stem for path in WRAPPERS.glob("*.py")} - NOT_A_FAMILY
    assert modules == {family.name for family in MODELS}
    for family in MODELS:
        module = importlib.import_module(f"torchtitan_tp_validate.wrappers.{family.name}")
        assert f"`{family.drop_in}`" in (module.__doc__ or "")


def test_a_package_of_torchtitan_belongs_to_one_family() -> None:
    packages = [package for family in MODELS for package in family.packages]
    assert len(packages) == len(set(packages))
    assert FAMILY_OF["qwen3_5"] is FAMILY_OF["qwen3_5_moe"]
    assert "transformers_backend" not in FAMILY_OF


def test_the_hugging_face_models_of_a_family_are_told_in_its_row() -> None:
    shared = hf_model_types(sharing_kv_heads_in="0.3")
    assert shared < hf_model_types()
    assert {"llama", "qwen3_moe", "gpt_oss", "qwen3_5_moe_text"} < shared
    # Latent attention has no key-value heads to share; 0.3.x has no Llama 4.
    assert hf_model_types() - shared == {"deepseek_v3", "kimi_k2", "kimi_vl", "kimi_k25", "kimi_k3"}
