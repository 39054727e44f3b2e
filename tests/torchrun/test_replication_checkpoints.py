"""Checkpoints of models with shared key-value heads are those of stock torchtitan, at every degree."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from tests.torchrun.conftest import ResultOf
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line

LINE = installed_line()
FAMILIES = [name for name in ("qwen3_fused", "qwen3_5_moe", "llama3") if name in LINE.FAMILIES]
FAMILIES = FAMILIES if len(FAMILIES) > 1 else ["llama3", "qwen3_moe"]
# With the two heads of the models here, TP 4 shares them. Which degrees is no matter of the family.
DEGREES = dict(zip(FAMILIES, ("1-2-4", "1-4", "1-4"), strict=False))


def moved(family: str) -> Case:
    sizes = {"num_experts": 8} if "num_experts" in LINE.SIZES[family] else {}
    settings = {"guard": "install", "upstream_check": True, "ac": "none", "checkpoints": DEGREES[family]}
    return Case.parse(f"{family}:8/2", ranks=4, sizes=sizes, **settings)


ADAPTED = Case.parse(
    "qwen3:8/2:backend=partial_dtensor,lora=4",
    ranks=4,
    **{"guard": "install", "upstream_check": True, "ac": "none", "checkpoints": "1-2-4"},
)
"""Adapters on every linear."""

CASES = [*map(moved, FAMILIES), *([ADAPTED] if "qwen3_5" in LINE.FAMILIES else [])]


def pairs(family: str) -> list[str]:
    return ["->".join(pair) for pair in permutations(DEGREES[family].split("-"), 2)]


def seen(result_of: ResultOf, family: str) -> list[dict[str, Any]]:
    result = result_of(moved(family))
    assert result.truth == "equal", result
    assert [report["rank"] for report in result.reports] == [0, 1, 2, 3], result
    return [report["checkpoints"] for report in result.reports]


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_optimizer_state_move_between_degrees_bit_for_bit(result_of: ResultOf, family: str) -> None:
    for report in seen(result_of, family):
        assert sorted(report["loaded"]) == pairs(family), report
        # A weight and two moments of each parameter at least.
        assert min(report["loaded"].values()) >= 3 * 20, report
        assert report["different"] == [], report


@pytest.mark.requires(torchtitan="0.3")
def test_weights_move_between_a_fused_projection_and_three(result_of: ResultOf) -> None:
    for report in seen(result_of, "qwen3_fused"):
        assert sorted(report["weights"]) == ["4->stock", "stock->4"], report
        assert min(report["weights"].values()) >= 20, report


def test_training_resumes_at_every_other_degree(result_of: ResultOf) -> None:
    for report in seen(result_of, FAMILIES[0]):
        assert sorted(report["resumed"]) == pairs(FAMILIES[0]), report
        losses = report["resumed"]
        # Each source has weights of its own: AdamW's first step makes much of the last bit of a gradient.
        for one, other in (("1->2", "1->4"), ("2->1", "2->4"), ("4->1", "4->2")):
            assert losses[one] == pytest.approx(losses[other], rel=1e-5), report


@pytest.mark.requires(torchtitan="0.3")
def test_adapters_and_their_optimizer_state_move_between_degrees_bit_for_bit(result_of: ResultOf) -> None:
    result = result_of(ADAPTED)
    assert result.truth == "equal", result
    for report in (report["checkpoints"] for report in result.reports):
        degrees = ADAPTED.checkpoints.split("-")
        assert sorted(report["loaded"]) == ["->".join(pair) for pair in permutations(degrees, 2)], report
        # Two adapters, of two moments each, for each of eight weights of two layers and the head.
        assert min(report["loaded"].values()) >= 2 * 3 * 14, report
        assert report["different"] == [], report
        losses = report["resumed"]
        for one, other in (("1->2", "1->4"), ("2->1", "2->4"), ("4->1", "4->2")):
            assert losses[one] == pytest.approx(losses[other], rel=1e-5), report


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hugging_face_adapter_exports_the_same(result_of: ResultOf, family: str) -> None:
    for report in seen(result_of, family):
        assert sorted(report["exported"]) == DEGREES[family].split("-"), report
        assert min(report["exported"].values()) >= 20, report
        assert report["exported_differently"] == [], report
