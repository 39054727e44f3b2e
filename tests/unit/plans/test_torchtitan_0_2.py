from __future__ import annotations

from types import SimpleNamespace

import torchtitan_tp_validate as tpv
from tests.unit.shapes import attention_layer, model_args
from torchtitan_tp_validate.plans import read_plan


def test_missing_n_kv_heads_means_mla_and_none_means_n_heads() -> None:
    mla = SimpleNamespace(n_heads=16, n_layers=3)
    for args in (mla, model_args(16, None, 3)):
        (dim,) = read_plan(args).dims
        assert (dim.code, dim.size, dim.layers) == ("TP001", 16, (0, 1, 2))


def test_a_model_is_read_through_its_args() -> None:
    assert tpv.valid_tp_degrees(SimpleNamespace(model_args=model_args(8, 2))) == [1, 2]


def test_a_pipeline_stage_is_judged_by_the_whole_model() -> None:
    args = model_args(8, 2, n_layers=4)
    stage = SimpleNamespace(model_args=args, layers={"3": attention_layer(8, 2)})
    empty_stage = SimpleNamespace(model_args=args, layers={})
    assert read_plan(stage) == read_plan(empty_stage) == read_plan(args)


def test_a_built_layer_that_differs_from_the_args_is_believed() -> None:
    model = SimpleNamespace(
        model_args=model_args(8, 4, n_layers=3),
        layers={"0": attention_layer(8, 4), "1": attention_layer(8, 2), "2": attention_layer(8, 4)},
    )
    sizes = {(dim.code, dim.size): dim.layers for dim in read_plan(model).dims}
    assert sizes == {("TP001", 8): (0, 1, 2), ("TP002", 4): (0, 2), ("TP002", 2): (1,)}
