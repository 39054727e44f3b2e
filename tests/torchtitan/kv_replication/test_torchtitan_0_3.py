from __future__ import annotations

import copy
import json
import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace as NS
from typing import Any
from unittest import mock

import pytest

import torchtitan_tp_validate as tpv
from tests.core.walks import in_the_map
from tests.forked import ROOT, in_forks, run_module
from tests.torchtitan.installed import RELEASE
from tests.torchtitan.optional import missing_for_qwen3_5, needs_qwen3_5, needs_torchao
from torchtitan_tp_validate.guards import guards_in_place
from torchtitan_tp_validate.job import Options, check_job

pytestmark = pytest.mark.requires(torchtitan=("0.3", "main"))

FUSED_LORA = """\
KV-head replication is not supported here: layers[0].attention: its wqkv has one LoRA adapter, where three \
projections would have three: another model.
Without this check the run might die in its first forward pass, or train wrongly.
What works: separate wq, wk and wv (or ReplicateKVHeads before LoRAConverter), plain, float8 or MXFP8, in \
llama3, qwen3, qwen3_5, gpt_oss and muse_glimmer, or a tensor parallel degree that divides n_kv_heads \
without --replicate-kv-heads."""


def converter() -> Any:
    from torchtitan_tp_validate.kv_replication import ReplicateKVHeads

    return ReplicateKVHeads.Config()


def registry(package: str, flavor: str, *converters: Any, **more: Any) -> Any:
    module = import_module(f"torchtitan.models.{package}")
    return module.model_registry(flavor, converters=list(converters), **more).model


def run_config(tp: int, **more: Any) -> Any:
    from torchtitan.config import ParallelismConfig

    return NS(parallelism=ParallelismConfig(tensor_parallel_degree=tp, **more))


@needs_qwen3_5
def test_the_registry_takes_the_converter_and_the_degrees_follow() -> None:
    assert tpv.valid_tp_degrees(registry("qwen3_5", "122B-A10B")) == [1, 2]
    converted = registry("qwen3_5", "122B-A10B", converter())
    assert tpv.valid_tp_degrees(converted) == [1, 2, 4, 8, 16]
    tpv.validate_tp_compat(converted, 4)


def test_torchtitans_own_check_passes_where_we_do_and_sees_the_true_heads_elsewhere() -> None:
    stock, converted = registry("llama3", "8B"), registry("llama3", "8B", converter())
    converted.update_from_config(config=run_config(16))
    assert [layer.attention.n_kv_heads for layer in converted.layers] == [8] * 32
    with pytest.raises(ValueError, match=r"tensor_parallel_degree \(16\) must divide n_kv_heads \(8\)"):
        stock.update_from_config(config=run_config(16))


@pytest.mark.parametrize("tp", [3, 5, 64])
def test_a_degree_that_fits_neither_way_is_refused_with_all_layers(tp: int) -> None:
    with pytest.raises(tpv.TPCompatError) as caught:
        registry("llama3", "8B", converter()).update_from_config(config=run_config(tp))
    assert caught.value.valid_degrees == [1, 2, 4, 8, 16, 32]


def test_a_later_layer_that_torchtitan_would_miss_is_refused() -> None:
    config = registry("llama3", "8B", converter())
    config.layers[5] = copy.deepcopy(config.layers[5])
    config.layers[5].attention.n_kv_heads = 3
    with pytest.raises(tpv.TPCompatError, match="in layer 5"):
        config.update_from_config(config=run_config(16))


def test_the_head_count_is_restored_when_torchtitan_refuses() -> None:
    config = registry("llama3", "8B", converter())
    config.enable_weight_tying = True
    with pytest.raises(NotImplementedError):
        config.update_from_config(config=run_config(16, pipeline_parallel_degree=2))
    assert config.layers[0].attention.n_kv_heads == 8


def test_converting_twice_changes_nothing_more() -> None:
    config = registry("llama3", "8B", converter())
    assert converter().build().convert(config) is config


@needs_qwen3_5
def test_the_converted_config_keeps_its_name_class_and_copies() -> None:
    stock, config = registry("qwen3_5", "debugmodel_moe"), registry("qwen3_5", "debugmodel_moe", converter())
    assert isinstance(config, type(stock))
    assert type(config).__qualname__ == type(stock).__qualname__
    clone = copy.deepcopy(config)
    assert clone.replicates_kv_heads
    assert config.to_dict().keys() == stock.to_dict().keys()


@pytest.mark.parametrize(
    ("package", "flavor"),
    [
        ("qwen3", "debugmodel"),
        ("llama3", "debugmodel"),
        pytest.param("qwen3_5", "debugmodel", marks=needs_qwen3_5),
        ("gpt_oss", "debugmodel"),
    ],
)
def test_state_dict_keys_and_shapes_are_those_of_stock(package: str, flavor: str) -> None:
    import torch

    with torch.device("meta"):
        stock = registry(package, flavor).build()
        ours = registry(package, flavor, converter()).build()
    assert {k: v.shape for k, v in stock.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }


@pytest.mark.parametrize(("package", "flavor"), [("qwen3", "debugmodel"), ("llama3", "debugmodel")])
def test_initial_values_are_those_of_stock_fused_or_not(package: str, flavor: str) -> None:
    import torch

    states = []
    for converters in ([], [converter()]):
        config = registry(package, flavor, *converters)
        config.layers = config.layers[:1]
        torch.manual_seed(0)
        model = config.build()
        model.init_states(buffer_device=None)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_fused_initializer_that_cannot_be_taken_apart_is_refused() -> None:
    config = registry("qwen3", "debugmodel")
    config.layers[0].attention.qkv_linear.wqkv.param_init = {"weight": lambda weight: weight}
    with pytest.raises(tpv.KVReplicationError, match="which cannot be taken apart"):
        converter().build().convert(config)


def lora(*modules: str) -> Any:
    from torchtitan.components.lora import LoRAConverter

    return LoRAConverter.Config(rank=4, target_modules=list(modules) or None)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("modules", [(), ("wkv",), ("wq",)])
def test_the_adapters_of_shared_heads_are_shared_and_what_is_frozen_stays_so(
    order: str, modules: tuple[str, ...]
) -> None:
    import torch

    from torchtitan_tp_validate.kv_replication.linears import KVHeadLinear

    converters = [lora(*modules), converter()] if order == "before" else [converter(), lora(*modules)]
    config = registry("qwen3", "debugmodel_non_fused_qkv", *converters)
    assert tpv.valid_tp_degrees(config) == [1, 2, 4, 8, 16]
    config.update_from_config(config=run_config(16))
    stock = registry("qwen3", "debugmodel_non_fused_qkv", lora(*modules))
    with torch.device("meta"):
        model, plain = config.build(), stock.build()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert trained == {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    assert {True, False} == {*trained.values()}
    for layer in model.layers.values():
        for linear in (layer.attention.qkv_linear.wk, layer.attention.qkv_linear.wv):
            assert isinstance(linear, KVHeadLinear)
            second = getattr(linear, "lora_b", None)
            assert (second is None) == (modules == ("wq",))
            assert second is None or (isinstance(second, KVHeadLinear) and second.n_kv_heads == 8)
        assert not isinstance(layer.attention.qkv_linear.wq, KVHeadLinear)


def test_one_adapter_of_a_fused_projection_is_refused_and_three_are_not() -> None:
    with pytest.raises(tpv.KVReplicationError) as caught:
        registry("qwen3", "debugmodel", lora(), converter())
    assert str(caught.value) == FUSED_LORA
    for converters in ([converter(), lora()], [lora("w1"), converter()]):
        config = registry("qwen3", "debugmodel", *converters)
        config.update_from_config(config=run_config(16))
        assert tpv.valid_tp_degrees(config) == [1, 2, 4, 8, 16]


@needs_torchao
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("name", "module"), [("Float8", "float8"), ("MXFP8", "mx")])
def test_low_precision_is_shared_in_any_order_and_keeps_what_it_is(
    name: str, module: str, order: str
) -> None:
    import torch

    owner = import_module(f"torchtitan.components.quantization.{module}")
    quantized = getattr(owner, f"{name}Linear")
    with mock.patch.object(owner, "has_cuda_capability", return_value=True):
        low = getattr(owner, f"{name}LinearConverter").Config()
        converters = [low, converter()] if order == "before" else [converter(), low]
        config = registry("qwen3", "debugmodel", *converters, lora())
    config.update_from_config(config=run_config(16))
    with torch.device("meta"):
        attention = config.build().layers["0"].attention.qkv_linear
    assert isinstance(attention.wk, quantized)
    assert (attention.wk.n_kv_heads, attention.wv.n_kv_heads, attention.wk.lora_b.n_kv_heads) == (8, 8, 8)
    assert (isinstance(attention.wq, quantized), hasattr(attention.wq, "n_kv_heads")) == (True, False)


@needs_torchao
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("head_dim", "degrees"),
    # 8 KV heads. A rank of 64 keeps 16 rows of wk, and multiplies by the 128 of its head; MXFP8 takes 32.
    [(128, [1, 2, 4, 8, 16, 32, 64]), (16, [1, 2, 4])],
)
def test_a_head_that_ranks_share_is_whole_blocks_of_low_precision_or_refused(
    head_dim: int, degrees: list[int], order: str
) -> None:
    from torchtitan.components.quantization import mx

    config = registry("qwen3", "debugmodel_non_fused_qkv")
    for layer in config.layers:
        attention, layer.feed_forward = layer.attention, registry("llama3", "8B").layers[0].feed_forward
        attention.n_heads, attention.head_dim = 64, head_dim
        attention.qkv_linear.wkv.out_features = 8 * head_dim
        attention.qkv_linear.wq.out_features = attention.wo.in_features = 64 * head_dim
    with mock.patch.object(mx, "has_cuda_capability", return_value=True):
        low = mx.MXFP8LinearConverter.Config(fqns=["attention.qkv_linear.wkv"]).build()
    steps = [low, converter().build()]
    for step in steps if order == "before" else steps[::-1]:
        config = step.convert(config)
    assert tpv.valid_tp_degrees(config) == degrees


@needs_torchao
def test_a_precision_that_no_cpu_computes_is_refused() -> None:
    from torchtitan.components.quantization import nvfp4

    if nvfp4.NVFP4Linear is None:
        pytest.skip("this torchao has no NVFP4")
    with mock.patch.object(nvfp4, "has_cuda_capability", return_value=True):
        low = nvfp4.NVFP4LinearConverter.Config(fqns=["attention"])
        with pytest.raises(tpv.KVReplicationError) as caught:
            registry("qwen3", "debugmodel_non_fused_qkv", low, converter())
    assert str(caught.value).splitlines()[0] == (
        "KV-head replication is not supported here: layers[0].attention: its wkv is a "
        "torchtitan.components.quantization.nvfp4.NVFP4Linear.Config."
    )


def test_what_cannot_be_had_is_refused_by_name() -> None:
    with pytest.raises(tpv.KVReplicationError, match=r"its qkv_linear is a .*AllGatherFusedQKVLinear"):
        registry("llama3", "debugmodel", converter(), tp_gemm_backend="dist_gemm")
    with pytest.raises(tpv.KVReplicationError, match="has no layers with n_kv_heads"):
        registry("deepseek_v3", "debugmodel", converter())
    config = run_config(4)
    config.compile = NS(enable_async_tensor_parallel=True)
    with pytest.raises(tpv.KVReplicationError, match=r"compile\.enable_async_tensor_parallel = true"):
        registry("llama3", "debugmodel", converter()).update_from_config(config=config)


@pytest.mark.parametrize(("tp", "cp"), [(16, 2), (32, 4)])
def test_long_sequences_are_no_reason_to_refuse(tp: int, cp: int) -> None:
    config = registry("llama3", "8B", converter(), attn_backend="flex")
    config.update_from_config(config=run_config(tp, context_parallel_degree=cp))
    assert [layer.attention.n_kv_heads for layer in config.layers] == [8] * 32


def test_a_model_that_cannot_have_it_is_not_told_of_it() -> None:
    config = registry("llama3", "8B", lora())
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(config, 16)
    assert caught.value.replication_degrees == []
    assert "replication" not in str(caught.value)
    with pytest.raises(tpv.TPCompatError, match="KV-head replication was asked for, but is not available"):
        tpv.validate_tp_compat(config, 16, replicate_kv_heads=True)


def test_a_head_that_does_not_split_over_the_ranks_is_refused() -> None:
    config = registry("llama3", "8B")
    for layer in config.layers:
        attention = layer.attention = copy.deepcopy(layer.attention)
        attention.head_dim, attention.n_kv_heads, attention.n_heads = 6, 2, 16
        qkv = attention.qkv_linear
        qkv.head_dim, qkv.n_kv_heads, qkv.n_heads, qkv.wqkv.out_features = 6, 2, 16, (16 + 2 + 2) * 6
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(config, 8, replicate_kv_heads=True)
    assert str(caught.value) == (
        "Tensor parallel degree (8) must divide kv_projection_rows (12). "
        "For Llama 3, max supported TP is 4.\n"
        "\n"
        "  TP014 kv_projection_rows = 12 is not a multiple of 8, in all 32 layers:\n"
        "        with shared key-value heads wk and wv stay split by rows over all ranks, through a head.\n"
        "\n"
        "Without this check: the parts of wk and wv that the ranks gather would differ in size.\n"
        "Degrees that work: 1, 2, 4.\n"
        "To change it: --parallelism.tensor_parallel_degree 4, or in the config registry:\n"
        "  parallelism=ParallelismConfig(tensor_parallel_degree=4)"
    )


@needs_qwen3_5
def test_a_job_is_converted_before_it_is_checked() -> None:
    from torchtitan.models.qwen3_5.config_registry import qwen35_122b_a10b

    with tpv.installed():
        with pytest.raises(tpv.TPCompatError):
            check_job(qwen35_122b_a10b(), guarded=guards_in_place())
        config = qwen35_122b_a10b()
        check_job(config, guarded=guards_in_place(), options=Options(replicate_kv_heads=True))
    assert config.model_spec.model.replicates_kv_heads


def test_a_model_built_without_the_converter_is_refused_by_the_guard() -> None:
    from torchtitan_tp_validate.wrappers.guard import guard

    def parallelize(model: Any, *, parallel_dims: Any) -> str:
        return "parallelized"

    parallelize.__module__ = "torchtitan.models.llama3.parallelize"
    guarded = guard(parallelize, replicate_kv_heads=lambda: True)
    stock = NS(config=registry("llama3", "8B"))
    with pytest.raises(tpv.KVReplicationError, match="was built from a config without it"):
        guarded(stock, parallel_dims=NS(tp=16))
    ours = NS(config=registry("llama3", "8B", converter()))
    assert guarded(ours, parallel_dims=NS(tp=16)) == "parallelized"
    parallelize.__module__ = "torchtitan.experiments.graph_trainer.llama3.parallelize"
    with pytest.raises(tpv.KVReplicationError, match="graph_trainer"):
        guarded(ours, parallel_dims=NS(tp=16))


@in_forks
@pytest.mark.parametrize("more", [[], ["--replicate-kv-heads"]])
def test_a_job_of_the_launcher_is_judged_and_converted_once_until_it_is_parallelized(
    more: list[str], tmp_path: Path
) -> None:
    tp = 16 if more else 8
    job = ["--module", "qwen3", "--config", "qwen3_debugmodel", "--dump_folder", str(tmp_path)]
    degree = ["--parallelism.tensor_parallel_degree", str(tp)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = run_module(
        f"{__package__}.count_judgements",
        [*job, *degree, *more],
        out=tmp_path,
        cwd=tmp_path,  # torchtitan writes its logs where it is
        env={"PYTHONPATH": path},
    )
    assert result.returncode == 0, result
    converted = len(more)
    # (judged, converted); the guard of the parallelize call knows the data degree that the ranks leave.
    done = json.loads(result.output.splitlines()[-1])
    assert done["seen"] == [[1, converted], [1, converted], [2, converted]]
    if more and RELEASE != "main":  # which enters one file more, on the way to that of 0.3.x
        assert ["train.py", *(file for file in done["files"] if file != "train.py")] == in_the_map(
            "--replicate-kv-heads"
        )
    assert done["back"] == []


def test_an_accepted_config_is_judged_again_when_it_is_copied_or_asked_for_something_else() -> None:
    from torchtitan_tp_validate.degrees import degrees_of_job

    def changed(config: Any) -> Any:
        config.layers[5] = copy.deepcopy(config.layers[5])
        config.layers[5].attention.n_kv_heads = 3
        return config

    config = registry("llama3", "8B", converter())
    config.accept(degrees_of_job(run_config(16)))
    with pytest.raises(tpv.TPCompatError, match="in layer 5"):
        changed(copy.deepcopy(config)).update_from_config(config=run_config(16))
    with pytest.raises(tpv.TPCompatError):
        config.update_from_config(config=run_config(64))
    config.accept(degrees_of_job(run_config(16)))
    config.update_from_config(config=run_config(16))
    with pytest.raises(tpv.TPCompatError, match="in layer 5"):
        changed(config).update_from_config(config=run_config(16))


@in_forks
@needs_qwen3_5
@pytest.mark.parametrize(
    ("name", "world_size", "tp", "shape"),
    [("qwen35_122b_a10b", 64, 4, [512, 3072]), ("qwen35_397b_a17b", 128, 8, [512, 4096])],
)
def test_the_shipped_configs_that_could_never_start_build_and_parallelize(
    name: str, world_size: int, tp: int, shape: list[int], tmp_path: Path
) -> None:
    result = run_module(f"{__package__}.build_shipped", [name, str(world_size)], out=tmp_path)
    assert result.returncode == 0, result
    seen = json.loads(result.output.splitlines()[-1])
    assert seen["tp"] == tp
    assert len(seen["wk"]) >= 2 * 12
    for built, over_all_ranks, on_this_rank in seen["wk"]:
        assert built == over_all_ranks == shape
        assert on_this_rank == [shape[0] // world_size, shape[1]]


@in_forks
def test_the_gather_passes_torchtitans_type_checking(tmp_path: Path) -> None:
    families = ["llama3", "gpt_oss"]
    # Main's gated-delta layers do not pass, stock or not, with what stands in for their kernel.
    if not missing_for_qwen3_5 and RELEASE != "main":
        families.append("qwen3_5")
    result = run_module(f"{__package__}.type_checked", families, out=tmp_path)
    assert result.returncode == 0, result
    shape = (32, 64) if RELEASE == "main" else (2, 32, 64)
    assert result.output.splitlines()[-len(families) :] == [f"{family} {shape}" for family in families]
