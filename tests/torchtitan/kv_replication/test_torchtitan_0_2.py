from __future__ import annotations

from types import SimpleNamespace as NS
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.guards import _guards, guards_in_place
from torchtitan_tp_validate.job import Options, check_job

pytestmark = pytest.mark.requires(torchtitan="0.2")

IN_FLOAT8 = """\
KV-head replication is not supported here: quantize.linear.float8.enable_fsdp_float8_all_gather = true has \
FSDP leave wk and wv in float8, each rank's rows by a scale of its own, and a head has rows of several ranks.
Without this check the run might die in its first forward pass, or train wrongly.
What works: enable_fsdp_float8_all_gather = false, or a tensor parallel degree that divides n_kv_heads \
without --replicate-kv-heads."""
FOREIGN = """\
KV-head replication is not supported here: layers.1.attention.wv is a {name}.
Without this check the run might die in its first forward pass, or train wrongly.
What works: torch.nn.Linear, float8 or MX, or a tensor parallel degree that divides n_kv_heads without \
--replicate-kv-heads."""


def tiny_model() -> Any:
    import dataclasses

    import torch
    from torchtitan.protocols.train_spec import get_train_spec

    spec = get_train_spec("llama3")
    args = spec.model_args["debugmodel"]
    args = dataclasses.replace(args, n_heads=8, n_kv_heads=2, n_layers=2)
    with torch.device("meta"):
        return spec.model_cls(args)


def job(**parallelism: Any) -> Any:
    from torchtitan.config import JobConfig

    config = JobConfig()
    config.model.name, config.model.flavor = "llama3", "8B"
    for name, value in parallelism.items():
        setattr(config.parallelism, name, value)
    return config


def test_wk_and_wv_alone_are_replaced_and_keep_their_parameter() -> None:
    from torchtitan_tp_validate.kv_replication.gather import SharesKVHeads
    from torchtitan_tp_validate.kv_replication.torchtitan_0_2 import replicate_kv_heads

    model = tiny_model()
    before = dict(model.named_parameters())
    replicate_kv_heads(model, 4)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    replaced = [name for name, module in model.named_modules() if isinstance(module, SharesKVHeads)]
    assert replaced == [f"layers.{layer}.attention.{name}" for layer in (0, 1) for name in ("wk", "wv")]


def test_a_degree_that_divides_the_heads_replaces_nothing() -> None:
    from torchtitan_tp_validate.kv_replication.gather import SharesKVHeads
    from torchtitan_tp_validate.kv_replication.torchtitan_0_2 import replicate_kv_heads

    model = tiny_model()
    replicate_kv_heads(model, 2)
    assert not any(isinstance(module, SharesKVHeads) for module in model.modules())


def test_a_projection_of_another_kind_is_refused() -> None:
    from torch import nn

    from torchtitan_tp_validate.kv_replication.torchtitan_0_2 import replicate_kv_heads

    class Foreign(nn.Linear):
        pass

    model = tiny_model()
    model.layers["1"].attention.wv = Foreign(1, 1, bias=False)
    with pytest.raises(tpv.KVReplicationError) as caught:
        replicate_kv_heads(model, 4)
    assert str(caught.value) == FOREIGN.format(name=f"{__name__}.{Foreign.__qualname__}")


def test_a_model_of_another_family_is_refused() -> None:
    from torchtitan.protocols.train_spec import get_train_spec

    from torchtitan_tp_validate.kv_replication.torchtitan_0_2 import replicate_kv_heads

    with pytest.raises(tpv.KVReplicationError, match="is not one of llama3, llama4 and qwen3"):
        replicate_kv_heads(NS(model_args=get_train_spec("deepseek_v3").model_args["debugmodel"]), 4)


def test_the_engine_allows_multiples_when_asked() -> None:
    model = tiny_model()
    assert tpv.valid_tp_degrees(model) == [1, 2]
    assert tpv.valid_tp_degrees(model, replicate_kv_heads=True) == [1, 2, 4, 8]
    tpv.validate_tp_compat(model, 4, replicate_kv_heads=True)
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(model, 4)
    assert caught.value.replication_degrees == [4, 8]
    assert (
        "KV-head replication (--replicate-kv-heads, or install(replicate_kv_heads=True)) adds: 4, 8."
        in str(caught.value).splitlines()
    )


CONTEXT = """\
KV-head replication is not supported here: parallelism.context_parallel_degree = 2 was shown to train what \
one process trains with llama3 and llama4 alone, and the model is qwen3.
Without this check the run has nobody's word that it trains right.
What works: context_parallel_degree = 1, or a tensor parallel degree that divides n_kv_heads without \
--replicate-kv-heads."""


def test_a_job_with_what_does_not_go_with_it_is_refused_at_startup() -> None:
    def check(config: Any) -> None:
        with tpv.installed():
            check_job(config, guarded=guards_in_place(), options=Options(replicate_kv_heads=True))

    def low_precision(name: str, **parallelism: Any) -> Any:
        config = job(tensor_parallel_degree=16, **parallelism)
        config.model.converters = [f"quantize.linear.{name}"]
        config.quantize.linear.float8.enable_fsdp_float8_all_gather = True
        return config

    for sharded in ({"data_parallel_shard_degree": 2}, {"context_parallel_degree": 2}):
        with pytest.raises(tpv.KVReplicationError) as caught:
            check(low_precision("float8", **sharded))
        assert str(caught.value) == IN_FLOAT8
    check(low_precision("float8", data_parallel_shard_degree=1))
    check(low_precision("float8"))  # the number of ranks will tell
    check(low_precision("mx", data_parallel_shard_degree=2))
    with pytest.raises(tpv.KVReplicationError, match=r"parallelism\.enable_async_tensor_parallel = true"):
        check(job(tensor_parallel_degree=16, enable_async_tensor_parallel=True))
    check(job(tensor_parallel_degree=16, context_parallel_degree=2))
    qwen3 = job(tensor_parallel_degree=16, context_parallel_degree=2)
    qwen3.model.name, qwen3.model.flavor = "qwen3", "0.6B"
    with pytest.raises(tpv.KVReplicationError) as caught:
        check(qwen3)
    assert str(caught.value) == CONTEXT
    check(job(tensor_parallel_degree=16))
    with pytest.raises(tpv.TPCompatError, match=r"must divide n_kv_heads \(8\)"), tpv.installed():
        check_job(job(tensor_parallel_degree=16), guarded=guards_in_place())


def test_a_job_that_nothing_guards_is_refused_rather_than_left_without() -> None:
    with pytest.raises(tpv.KVReplicationError, match="which is not guarded"):
        check_job(job(tensor_parallel_degree=16), guarded=[], options=Options(replicate_kv_heads=True))


def test_the_guard_replicates_only_while_it_was_asked_to() -> None:
    from torchtitan_tp_validate.wrappers.guard import guard

    def parallelize(model: Any, parallel_dims: Any, job_config: Any) -> str:
        return type(model.layers["0"].attention.wk).__name__

    parallelize.__module__ = "torchtitan.models.llama3.infra.parallelize"
    asked = [True]
    guarded = guard(parallelize, replicate_kv_heads=lambda: asked[0])
    assert guarded(tiny_model(), NS(tp=4, dp_shard=1), job()) == "KVHeadLinear"
    assert guarded(tiny_model(), NS(tp=2, dp_shard=1), job()) == "Linear"
    asked[0] = False
    with pytest.raises(tpv.TPCompatError):
        guarded(tiny_model(), NS(tp=4), job())
    asked[0] = True
    parallelize.__module__ = "torchtitan.experiments.simple_fsdp.llama3.parallelize"
    with pytest.raises(tpv.KVReplicationError, match="simple_fsdp"):
        guarded(tiny_model(), NS(tp=4), job())


def test_weights_that_fsdp_gathers_in_float8_are_refused_where_the_ranks_tell_that_it_does() -> None:
    from torchtitan_tp_validate.kv_replication.torchtitan_0_2 import put_into_call

    def parallelize() -> None: ...

    parallelize.__module__ = "torchtitan.models.llama3.infra.parallelize"
    config = job(tensor_parallel_degree=4, data_parallel_shard_degree=-1)
    config.model.converters = ["quantize.linear.float8"]
    config.quantize.linear.float8.enable_fsdp_float8_all_gather = True
    arguments = {"model": tiny_model(), "job_config": config}
    put_into_call(parallelize, {**arguments, "parallel_dims": NS(tp=4, dp_shard=1)}, 4)
    with pytest.raises(tpv.KVReplicationError) as caught:
        put_into_call(parallelize, {**arguments, "parallel_dims": NS(tp=4, dp_shard=2)}, 4)
    assert str(caught.value) == IN_FLOAT8


def test_uninstall_ends_replication() -> None:
    tpv.install()
    assert _guards.replicate_kv_heads is False
    tpv.install(replicate_kv_heads=True)
    tpv.install()
    assert _guards.replicate_kv_heads is True
    tpv.uninstall()
    assert _guards.replicate_kv_heads is False
