"""What is offered for the installed torchtitan's own models is what is accepted, at any degrees."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace as NS
from typing import Any

import pytest
import torch

import torchtitan_tp_validate as tpv
from tests.core.offers import accepts, contradictions, offered, refusal
from tests.torchtitan.installed import HAS_CONFIG_TREES, SPMD_BACKENDS
from torchtitan_tp_validate import registry
from torchtitan_tp_validate.degrees import Degrees

FAMILIES = {
    "llama3": "debugmodel",
    "qwen3": "debugmodel_moe",
    "deepseek_v3": "debugmodel",
    **(
        {"qwen3_5": "debugmodel_moe", "gpt_oss": "debugmodel"}
        if HAS_CONFIG_TREES
        else {"llama4": "debugmodel"}
    ),
}
BACKENDS = SPMD_BACKENDS or ("",)
# EP, ETP, data shards, CP, replicas
CHOICES = [
    (1, 1, 1, 1, 1),
    (1, 1, 48, 1, 1),
    (1, 1, 64, 2, 1),
    (1, 1, 32, 1, 4),
    (2, 1, 64, 1, 1),
    (3, 1, 6, 1, 1),
    *([] if HAS_CONFIG_TREES else [(2, 2, 64, 1, 1)]),
]


@pytest.fixture(autouse=True)
def _for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchtitan has it unless told otherwise, which other tests of the same process do."""
    monkeypatch.setattr("torchtitan.tools.utils.device_type", "cuda")


def subject(family: str, flavor: str) -> Any:
    """The config of 0.3; of 0.2, whose args know no expert's size, the model itself."""
    spec = registry.model(family).spec(flavor)
    config = spec.config
    if HAS_CONFIG_TREES:
        return config
    config = copy.copy(config)
    config.moe_impl = "standard"  # deepseek_v3 of 0.2.2 hears it from the job
    train_spec = importlib.import_module("torchtitan.protocols.train_spec").get_train_spec(family)
    with torch.device("meta"):
        return train_spec.model_cls(config)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_offered_is_what_is_accepted(family: str, backend: str) -> None:
    model = subject(family, FAMILIES[family])
    found = []
    for ep, etp, dp_shard, cp, replicas in CHOICES:
        degrees = Degrees(
            tp=2, ep=ep, etp=etp, dp_shard=dp_shard, cp=cp, dp_replicate=replicas, spmd_backend=backend
        )
        found += contradictions(model, degrees, 17, (4, 16))
    assert not found, "\n".join(found[:20])


@pytest.mark.requires(torchtitan="0.3")  # 0.2 asks for rows with expert parallelism only
@pytest.mark.parametrize(
    ("ep", "dp_shard", "valid"),
    [(8, 256, [1, 2, 4]), (1, 64, [1, 2]), (1, 128, [1]), (1, 256, [1]), (8, 64, [1, 2, 4, 8, 16])],
)
def test_degrees_of_a_model_whose_experts_fsdp_cuts_by_rows(ep: int, dp_shard: int, valid: list[int]) -> None:
    config = subject("deepseek_v3", "16B")
    degrees = NS(tp=1, ep=ep, dp_shard=dp_shard, spmd_backend="spmd_types")
    assert tpv.valid_tp_degrees(config, degrees) == valid
    for tp in (1, 2, 4, 8, 16):
        run = Degrees(tp=tp, ep=ep, dp_shard=dp_shard)
        assert accepts(config, run) is (tp in valid)
        error = refusal(config, run)
        if error is not None:
            assert error.valid_degrees == valid
            assert all(accepts(config, other) for other in offered(str(error), run))
