from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import attention_layer, config_tree, delta_layer, told
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import Split
from torchtitan_tp_validate.releases import read_plan


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


def fork(layer: Any, n_layers: int = 4, **more: Any) -> Any:
    """A model config of the fork generation, with sizes that are no multiple of one another."""
    return SimpleNamespace(layer=layer, n_layers=n_layers, vocab_size=2048, **more)


def fork_layer(**more: Any) -> Any:
    """Its layer config: heads that any degree up to 8 splits."""
    return SimpleNamespace(attention=SimpleNamespace(n_heads=8, n_kv_heads=8), **more)


def mlp_dims(config: Any) -> dict[tuple[str, int], tuple[int, ...]]:
    """Code and size -> layers, of everything but heads and the vocabulary."""
    return {
        (dim.code, dim.size): dim.layers
        for dim in read_plan(config).dims
        if dim.code not in ("TP001", "TP002", "TP006")
    }


DENSE = SimpleNamespace(hidden_dim=250)
MOE = SimpleNamespace(num_experts=6, num_shared_experts=2, hidden_dim=35)


@pytest.mark.parametrize(
    ("layer", "dims"),
    [
        # llama3
        (fork_layer(feed_forward=DENSE, moe=None), {("TP005", 250): (0, 1, 2, 3)}),
        # qwen3
        (fork_layer(feed_forward=DENSE, moe=MOE, moe_enabled=False), {("TP005", 250): (0, 1, 2, 3)}),
        (
            fork_layer(feed_forward=None, moe=MOE, moe_enabled=True),
            {("EP001", 6): (0, 1, 2, 3), ("TP010", 70): (0, 1, 2, 3)},
        ),
        # llama4
        (
            fork_layer(feed_forward=DENSE, moe=MOE, interleave_moe_layer_step=2),
            {("TP005", 250): (0, 2), ("EP001", 6): (1, 3), ("TP010", 70): (1, 3)},
        ),
        (
            fork_layer(feed_forward=DENSE, moe=SimpleNamespace(), interleave_moe_layer_step=3),
            {("TP005", 250): (0, 1, 3)},
        ),
        # deepseek_v3
        (
            fork_layer(feed_forward=DENSE, moe=MOE, n_dense_layers=1),
            {("TP005", 250): (0,), ("EP001", 6): (1, 2, 3), ("TP010", 70): (1, 2, 3)},
        ),
        # gpt_oss
        (
            fork_layer(feed_forward=None, moe=SimpleNamespace(num_experts=6, num_shared_experts=0)),
            {("EP001", 6): (0, 1, 2, 3)},
        ),
        # qwen3_5_moe
        (
            fork_layer(
                feed_forward=DENSE,
                moe=SimpleNamespace(num_experts=6, num_shared_experts=0, hidden_dim=35),
                deltanet=SimpleNamespace(n_key_heads=3),
            ),
            {("TP010", 250): (0, 1, 2, 3), ("EP001", 6): (0, 1, 2, 3)},
        ),
    ],
)
def test_the_fork_splits_the_feed_forward_of_each_layer(
    layer: Any, dims: dict[tuple[str, int], tuple[int, ...]]
) -> None:
    assert mlp_dims(fork(layer)) == dims
    skips = ("TP011, TP013, FSDP001: the routed experts of this torchtitan are not read",)
    in_a_run = read_plan(fork(layer), Degrees(tp=1, seq_len=8))
    assert in_a_run.not_judged == (() if layer.moe is None else skips)


def test_a_feed_forward_of_the_fork_that_tp_does_not_divide_is_refused() -> None:
    config = fork(fork_layer(feed_forward=DENSE, moe=None))
    assert tpv.valid_tp_degrees(config) == [1, 2]
    with pytest.raises(tpv.TPCompatError) as error:
        tpv.validate_tp_compat(config, SimpleNamespace(tp=4))
    headline, _, rest = str(error.value).partition("\n")
    assert headline == (
        "Tensor parallel degree (4) must divide feed_forward_hidden_dim (250). "
        "For SimpleNamespace, max supported TP is 2."
    )
    assert "TP005 feed_forward_hidden_dim = 250 is not a multiple of 4, in all 4 layers:\n" in rest
    assert 'the first forward pass dies with "a and b must have same reduction dim".\n' in rest


def test_the_fork_has_no_check_of_its_own_and_dies_in_forward() -> None:
    config = fork(SimpleNamespace(attention=SimpleNamespace(n_heads=8, n_kv_heads=2)))
    with pytest.raises(tpv.TPCompatError) as error:
        tpv.validate_tp_compat(config, SimpleNamespace(tp=4))
    text = str(error.value)
    assert "the run starts, and its first forward pass dies in attention with" in text
    assert "torchtitan looks at" not in text


def test_the_fork_wants_whole_parts_of_the_sequence_and_no_empty_part_of_the_vocabulary() -> None:
    config = fork(fork_layer())
    plan = read_plan(config, Degrees(tp=4, cp=2, seq_len=24))
    by_code = {dim.code: dim for dim in plan.dims}
    assert not by_code["TP009"].allows(4)
    assert by_code["TP009"].allows(2)
    assert by_code["TP006"].allows(3)
    assert by_code["TP006"].split is Split.NOT_EMPTY


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (fork(fork_layer(), 0), "SimpleNamespace.n_layers"),
        (SimpleNamespace(**{**vars(fork(fork_layer())), "vocab_size": 0}), "SimpleNamespace.vocab_size"),
        (fork(SimpleNamespace(attention=SimpleNamespace(n_heads=0))), "layer.attention.n_heads"),
        (fork(fork_layer(feed_forward=SimpleNamespace(hidden_dim=0))), "layer.feed_forward.hidden_dim"),
        (fork(fork_layer(moe=SimpleNamespace(num_experts=0))), "layer.moe.num_experts"),
        (fork(fork_layer(moe=SimpleNamespace(num_shared_experts=1, hidden_dim=0))), "layer.moe.hidden_dim"),
        (
            fork(fork_layer(moe=SimpleNamespace(num_shared_experts=-1, hidden_dim=4))),
            "layer.moe.num_shared_experts",
        ),
    ],
)
def test_a_size_of_the_fork_that_is_none_is_named(config: Any, name: str) -> None:
    with pytest.raises(tpv.PlanError, match=f"^{re.escape(f'Not validated: {name} must be a positive')}"):
        read_plan(config)


def test_the_vocabulary_of_the_fork_is_judged_where_its_size_is_known() -> None:
    config = fork(fork_layer())
    assert told(read_plan(config).dims, 4) == [
        "TP001 n_heads 8: even, in all 4 layers",
        "TP002 n_kv_heads 8: even, in all 4 layers",
        "TP006 vocab_size 2048: not empty, in tok_embeddings, output",
    ]
    config.vocab_size = None
    assert read_plan(config, Degrees(tp=2, seq_len=8)).not_judged == ("TP006: the config has no vocab_size",)


def test_a_model_of_the_fork_is_named_for_its_family() -> None:
    module = {"__module__": "torchtitan.models.qwen3_5_moe.model"}
    of_qwen = type("Config", (SimpleNamespace,), module)
    assert read_plan(of_qwen(**vars(fork(fork_layer())))).model == "Qwen3.5"
    assert read_plan(of_qwen(**vars(fork(fork_layer(moe=MOE))))).model == "Qwen3.5-MoE"


def test_a_broken_delta_net_is_named() -> None:
    layer = delta_layer()
    layer.delta_net.key_head_dim = 0
    with pytest.raises(tpv.PlanError, match=re.escape("layers[0].delta_net.key_head_dim must be a positive")):
        tpv.valid_tp_degrees(config_tree(layer))


def test_of_a_model_of_the_fork_that_a_function_of_somebodys_own_splits_the_heads_are_judged_alone() -> None:
    config = fork(fork_layer(feed_forward=DENSE))
    codes = {dim.code for dim in read_plan(config, Degrees(tp=2, by_own_function=True)).dims}
    assert codes == {"TP001", "TP002"} < {dim.code for dim in read_plan(config, Degrees(tp=2)).dims}
