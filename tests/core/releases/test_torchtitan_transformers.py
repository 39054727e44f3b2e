"""torchtitan's transformers backend, by the shape of its bridging config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import told
from torchtitan_tp_validate.releases import line_of, read_plan, torchtitan_0_2, torchtitan_0_3


def config(n_heads: Any = 8, n_kv_heads: Any = 2, n_layers: Any = 2, **more: Any) -> Any:
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_layers": n_layers}
    return SimpleNamespace(_tt_to_hf_attribute_map={}, **heads, **more)


def test_a_model_and_its_config_give_the_same_plan_in_the_words_of_the_line() -> None:
    plan = read_plan(config(model_type="qwen3"))
    assert (plan.model, plan.n_layers) == ("qwen3", 2)
    assert told(plan.dims, 2) == [
        "TP001 n_heads 8: even, in all 2 layers",
        "TP002 n_kv_heads 2: even, in all 2 layers",
    ]
    model = SimpleNamespace(model=SimpleNamespace(config=config(model_type="qwen3")))
    assert read_plan(model).dims == plan.dims
    assert plan.how_to_change == torchtitan_0_2.HOW_TO_CHANGE
    assert read_plan(config(build=print)).how_to_change == torchtitan_0_3.HOW_TO_CHANGE
    assert read_plan(config()).model == "this model"


@pytest.mark.parametrize("width", [{"head_dim": 4}, {"dim": 32}])
def test_ranks_can_share_kv_heads_of_a_known_width(width: dict[str, int]) -> None:
    plan = read_plan(config(model_type="qwen3", **width))
    assert told(plan.with_kv_replication().dims, 2)[1:] == [
        "TP002 n_kv_heads 2: shared, in all 2 layers",
        "TP014 kv_projection_rows 8: even, in all 2 layers",
    ]
    assert plan.how_to_replicate == "--replicate-kv-heads, or install(replicate_kv_heads=True)"
    assert read_plan(config(model_type="qwen3")).shared_kv == ()


@pytest.mark.parametrize("more", [{}, {"build": print}])
def test_a_model_is_of_the_line_whose_config_it_has(more: dict[str, Any]) -> None:
    model = SimpleNamespace(model=SimpleNamespace(config=config(**more)))
    assert line_of(model) is (torchtitan_0_3 if more else torchtitan_0_2)


@pytest.mark.parametrize("heads", [{"n_heads": None}, {"n_kv_heads": None}])
def test_a_config_whose_model_is_not_built_yet_says_so(heads: dict[str, Any]) -> None:
    with pytest.raises(tpv.PlanError) as caught:
        read_plan(config(**heads))
    assert str(caught.value) == (
        "Not validated: SimpleNamespace gets its head counts from the Hugging Face model that the job names, "
        "when the model is built."
    )
    if "n_kv_heads" in heads:  # multi-head attention
        assert len(read_plan(config(model_type="bert", **heads)).dims) == 1


def test_a_number_that_is_none_is_named() -> None:
    for broken, name in (({"n_heads": 0}, "n_heads"), ({"n_layers": 0}, "n_layers")):
        with pytest.raises(tpv.PlanError) as caught:
            read_plan(config(model_type="llama", **broken))
        assert str(caught.value) == (
            f"Not validated: SimpleNamespace.{name} must be a positive whole number, got 0."
        )


def test_a_config_whose_layers_differ_is_not_read_for_one_number() -> None:
    class Unequal(SimpleNamespace):
        @property
        def n_layers(self) -> int:
            raise ValueError("layers differ")

    with pytest.raises(tpv.PlanError) as caught:
        read_plan(Unequal(_tt_to_hf_attribute_map={}, model_type="gemma", n_heads=8, n_kv_heads=2))
    assert str(caught.value).startswith("Not validated: the head counts of ")
    assert str(caught.value).endswith("Unequal cannot be read: layers differ")
