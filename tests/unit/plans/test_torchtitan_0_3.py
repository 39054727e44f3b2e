from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

import torchtitan_tp_validate as tpv
from tests.unit.shapes import attention_layer, config_tree, delta_layer
from torchtitan_tp_validate.plans import read_plan


def test_a_model_and_its_config_give_the_same_plan() -> None:
    config = config_tree(attention_layer(8, 2), delta_layer(4, 8))
    assert read_plan(SimpleNamespace(config=config, layers={})) == read_plan(config)


def test_multi_token_prediction_layers_count_after_the_main_layers() -> None:
    config = config_tree(attention_layer(8, 4), mtp_layers=[attention_layer(8, 2)])
    sizes = {(dim.code, dim.size): dim.layers for dim in read_plan(config).dims}
    assert sizes[("TP002", 2)] == (1,)


def test_the_fork_has_one_layer_config_and_replicates_its_delta_layers() -> None:
    layer = attention_layer(16, 2)
    layer.deltanet = SimpleNamespace(n_key_heads=3, n_value_heads=5)
    fork = SimpleNamespace(layer=layer, n_layers=8, full_attention_interval=4)
    sizes = {(dim.code, dim.size): dim.layers for dim in read_plan(fork).dims}
    assert sizes == {("TP001", 16): (3, 7), ("TP002", 2): (3, 7)}
    assert tpv.valid_tp_degrees(SimpleNamespace(config=fork)) == [1, 2]


def test_a_broken_delta_net_is_named() -> None:
    layer = delta_layer()
    layer.delta_net.key_head_dim = 0
    with pytest.raises(tpv.PlanError, match=re.escape("layers[0].delta_net.key_head_dim must be a positive")):
        tpv.valid_tp_degrees(config_tree(layer))
