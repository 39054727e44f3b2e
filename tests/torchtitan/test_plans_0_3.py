"""Verdicts on torchtitan 0.3's own config trees: every sharded dimension, by backend, and users' models."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from importlib import import_module
from types import SimpleNamespace as NS
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate import registry
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.hardware import build_for_its_hardware
from torchtitan_tp_validate.job import read_job
from torchtitan_tp_validate.validate import judge

pytestmark = pytest.mark.requires(torchtitan="0.3")  # which declares its shardings

CANNOT_START = {"qwen35_122b_a10b", "qwen35_397b_a17b"}


@pytest.fixture(autouse=True)
def _for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchtitan has it unless told otherwise, which other tests of the same process do."""
    monkeypatch.setattr("torchtitan.tools.utils.device_type", "cuda")


def registered(model: str, flavor: str) -> Any:
    return import_module(f"torchtitan.models.{model}").model_registry(flavor).model


def resized(config: Any, **sizes: int) -> Any:
    return dataclasses.replace(config, **sizes)


def with_hidden(config: Any, hidden: int, layer: int = 1) -> Any:
    """The same model with another feed-forward size in one layer."""
    ffn = config.layers[layer].feed_forward
    ffn.w1, ffn.w3 = resized(ffn.w1, out_features=hidden), resized(ffn.w3, out_features=hidden)
    ffn.w2 = resized(ffn.w2, in_features=hidden)
    return config


def with_vocab(config: Any, size: int) -> Any:
    config.vocab_size = size
    config.lm_head = resized(config.lm_head, out_features=size)
    config.tok_embeddings = resized(config.tok_embeddings, num_embeddings=size)
    return config


def dims(tp: int, backend: str = "spmd_types", ep: int = 1) -> Any:
    return NS(tp=tp, ep=ep, spmd_backend=backend)


def refusal(config: Any, parallel_dims: Any) -> tpv.TPCompatError:
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(config, parallel_dims)
    return caught.value


def test_an_uneven_feed_forward_would_train_silently_wrong() -> None:
    config = with_hidden(registered("llama3", "debugmodel"), 193)
    error = refusal(config, dims(2))
    assert str(error) == (
        "Tensor parallel degree (2) must divide feed_forward_hidden_dim (193). "
        "For Llama 3, max supported TP is 1.\n"
        "\n"
        "  TP005 feed_forward_hidden_dim = 193 is not a multiple of 2, in layer 1 (1 of 6):\n"
        "        w1 and w3 are split by columns and w2 by rows, so that every rank has an equal part.\n"
        "\n"
        "Without this check: torchtitan pads the dimension to a multiple of the degree and trains on "
        "SILENTLY,\n"
        "  with other losses and gradients than the model's own, and no error at all.\n"
        "Degrees that work: 1.\n"
        "To change it: --parallelism.tensor_parallel_degree 1, or in the config registry:\n"
        "  parallelism=ParallelismConfig(tensor_parallel_degree=1)"
    )
    assert [(v.code, v.silent, v.layers) for v in error.violations] == [("TP005", True, (1,))]


@pytest.mark.parametrize("backend", ["partial_dtensor", "full_dtensor"])
@pytest.mark.parametrize("change", [lambda c: with_hidden(c, 193), lambda c: with_vocab(c, 2047)])
def test_dtensor_backends_take_uneven_sizes(backend: str, change: Any) -> None:
    tpv.validate_tp_compat(change(registered("llama3", "debugmodel")), dims(2, backend))


@pytest.mark.parametrize("backend", ["partial_dtensor", "full_dtensor"])
def test_heads_must_divide_on_every_backend(backend: str) -> None:
    assert refusal(registered("llama3", "8B"), dims(16, backend)).violations[0].code == "TP002"


def test_an_uneven_vocabulary_is_named_where_it_is() -> None:
    (violation,) = refusal(with_vocab(registered("llama3", "debugmodel"), 2047), dims(2)).violations
    assert (violation.code, violation.dim, violation.size) == ("TP006", "vocab_size", 2047)
    assert set(violation.where.split(" and ")) == {"tok_embeddings", "lm_head"}


def test_a_later_layer_alone_is_refused_and_named() -> None:
    config = registered("llama3", "debugmodel")
    config.layers[1].attention = resized(config.layers[1].attention, n_kv_heads=2)
    (violation,) = refusal(config, dims(4)).violations
    assert (violation.code, violation.where) == ("TP002", "layer 1 (1 of 6)")


@pytest.mark.parametrize(("ep", "codes"), [(1, ["TP011", "TP013"]), (2, []), (3, ["EP001"])])
def test_routed_experts_are_split_by_hidden_size_or_by_number(ep: int, codes: list[str]) -> None:
    config = registered("qwen3", "debugmodel_moe")
    experts = next(layer.moe.routed_experts for layer in config.layers if layer.moe is not None)
    experts.inner_experts = resized(experts.inner_experts, hidden_dim=193)
    if codes:
        assert [v.code for v in refusal(config, dims(2, ep=ep)).violations] == codes
    else:
        tpv.validate_tp_compat(config, dims(2, ep=ep))


def qwen3_moe(hidden: int) -> Any:
    """The debug model, 64 experts in each layer, with this hidden size in all of them."""
    config = registered("qwen3", "debugmodel_moe")
    for layer in config.layers:
        routed = layer.moe.routed_experts
        routed.inner_experts = resized(routed.inner_experts, hidden_dim=hidden)
    return config


def test_a_rank_whose_part_of_the_experts_is_not_aligned_dies_in_the_grouped_product() -> None:
    error = refusal(qwen3_moe(48), dims(4))
    assert str(error) == (
        "Tensor parallel degree (4) does not fit expert_hidden_dim (48). "
        "For Qwen3-MoE, max supported TP is 2.\n"
        "\n"
        "  TP013 expert_hidden_dim = 48 does not give each of 4 ranks a multiple of 8, in all 8 layers:\n"
        "        the grouped product of routed experts takes rows of whole 16 bytes, 8 in bfloat16.\n"
        "\n"
        'Without this check: the first forward pass dies with "strides should be multiple of 16 bytes".\n'
        "Degrees that work: 1, 2.\n"
        "To change it: --parallelism.tensor_parallel_degree 2, or in the config registry:\n"
        "  parallelism=ParallelismConfig(tensor_parallel_degree=2)"
    )
    judge(qwen3_moe(48), Degrees(tp=4, device_type="cpu"))
    judge(qwen3_moe(48), Degrees(tp=4, ep=2))


def test_rows_that_fsdp_would_have_to_shard_unevenly_are_refused() -> None:
    parallel_dims = NS(tp=2, dp_shard=64, spmd_backend="spmd_types")
    error = refusal(qwen3_moe(160), parallel_dims)
    assert str(error) == (
        "Data parallel shard degree (64) must divide expert_hidden_dim / tp (80). "
        "For Qwen3-MoE, max supported FSDP is 32.\n"
        "\n"
        "  FSDP001 expert_hidden_dim / tp = 80 is not a multiple of 64, in all 8 layers:\n"
        "        with more ranks than experts, FSDP cuts the rows of their weights, and only evenly.\n"
        "\n"
        "Without this check: the parallelize function stops with\n"
        '  "FSDP does not support uneven sharding on dim 1", when the process groups are up.\n'
        "Data parallel shard degrees that work: 1-32.\n"  # 32 * TP 2 are as many ranks as experts
        "Tensor parallel degrees that work: 1.\n"
        "To change it: --parallelism.data_parallel_shard_degree 32, or in the config registry:\n"
        "  parallelism=ParallelismConfig(data_parallel_shard_degree=32)"
    )
    # The FSDP mesh of this backend leaves the TP axis out: 64 ranks for 64 experts.
    tpv.validate_tp_compat(qwen3_moe(160), NS(tp=2, dp_shard=64, spmd_backend="partial_dtensor"))
    with pytest.raises(tpv.TPCompatError, match=re.escape("(65) must divide")):
        tpv.validate_tp_compat(qwen3_moe(160), NS(tp=2, dp_shard=65, spmd_backend="partial_dtensor"))
    judge(qwen3_moe(160), Degrees(tp=2, dp_shard=64, fsdp=False))


def test_ranks_that_replicate_the_data_count_where_experts_are_not_spread() -> None:
    # torchtitan compares all ranks with the 64 experts: 2 * 32 of TP 2 are more.
    judge(qwen3_moe(160), Degrees(tp=2, dp_shard=32))
    (violation,) = refusal(qwen3_moe(160), NS(tp=2, dp_shard=32, dp_replicate=2)).violations
    assert (violation.code, violation.size, violation.degree) == ("FSDP001", 80, 32)
    judge(qwen3_moe(160), Degrees(tp=2, ep=2, dp_shard=32, dp_replicate=2))


def test_the_expert_degree_is_refused_in_its_own_words() -> None:
    config = registered("qwen3", "debugmodel_moe")
    error = refusal(config, dims(1, ep=3))
    assert str(error).startswith(
        "Expert parallel degree (3) must divide num_experts (64). For Qwen3-MoE, max"
    )
    assert "--parallelism.expert_parallel_degree 2" in str(error)
    assert error.valid_degrees == []  # of TP: none helps


def users_model(**more: Any) -> Any:
    from tests.torchtitan.users_model import UsersModel

    base = registered("llama3", "debugmodel")
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return UsersModel.Config(**fields, **more)


def test_a_users_own_model_is_judged_by_its_declared_shardings() -> None:
    assert tpv.valid_tp_degrees(users_model()) == [1, 2, 4, 8, 16]
    assert [v.code for v in refusal(with_hidden(users_model(), 193), dims(2)).violations] == ["TP005"]
    tpv.validate_tp_compat(with_hidden(users_model(), 193), dims(2, "partial_dtensor"))


def test_a_parameter_of_no_known_kind_is_judged_and_named_by_its_path() -> None:
    adapter = resized(registered("llama3", "debugmodel").layers[0].feed_forward.w1, out_features=255)
    error = refusal(users_model(adapter=adapter), dims(2))
    assert str(error).startswith(
        "Tensor parallel degree (2) must divide adapter.weight (255). For UsersModel, max supported TP is 1."
    )
    assert error.violations[0].code == "TP012"


def test_a_tree_whose_shardings_cannot_be_declared_is_not_validated() -> None:
    config = users_model()
    config.layers[0].feed_forward = None
    with pytest.raises(tpv.PlanError, match=re.escape("Not validated: UsersModel.Config does not declare")):
        tpv.valid_tp_degrees(config)


def test_a_vocabulary_without_layers_is_not_a_model() -> None:
    config = users_model()
    config.layers = []
    with pytest.raises(tpv.PlanError, match="UsersModel has 0 layers"):
        tpv.validate_tp_compat(config, 2)


def test_equal_layers_are_read_once_and_unequal_ones_each() -> None:
    config = users_model()
    for hidden, layer in ((96, 1), (100, 2), (96, 4)):
        with_hidden(config, hidden, layer)
    by_size = {v.size: v.layers for v in refusal(config, dims(64)).violations if v.code == "TP005"}
    assert by_size == {96: (1, 4), 100: (2,)}


def shipped_jobs() -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name in filter(registry.is_model, registry.names()):
        # A package that the model imports, and that nothing has to install.
        with contextlib.suppress(registry.UnavailableError):
            found += registry.configs(name).items()
    return found


@pytest.mark.parametrize(("name", "build"), shipped_jobs(), ids=[name for name, _ in shipped_jobs()])
def test_shipped_jobs_are_accepted_but_for_the_two_that_cannot_start(name: str, build: Any) -> None:
    try:
        job = read_job(build_for_its_hardware(build)[0])
    except ImportError as error:
        pytest.skip(f"{name} cannot be built here: {error}")
    if name.startswith("flux"):
        pytest.skip("flux has no tensor parallelism")
    assert job is not None
    if name in CANNOT_START:
        with pytest.raises(tpv.TPCompatError) as caught:
            judge(job.subject, job.degrees)
        assert caught.value.violations[0].code == "TP002"
    else:
        judge(job.subject, job.degrees)
