"""What stands in the way of shared key-value heads, told by the names of classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchtitan_tp_validate.errors import KVReplicationError
from torchtitan_tp_validate.releases.kv_replication import (
    problem_with_attention,
    projections,
    raise_if_untried,
    shares_linear,
)

COMMON = "torchtitan.models.common"
QUANTIZATION = "torchtitan.components.quantization"


def of(name: str, **fields: Any) -> Any:
    """A config of the nested class of this full name."""
    module, outer, inner = name.rsplit(".", 2)
    namespace = {"__module__": module, "__qualname__": f"{outer}.{inner}"}
    return type("Config", (SimpleNamespace,), namespace)(**fields)


def linear(name: str = f"{COMMON}.linear.Linear.Config") -> Any:
    return of(name)


def adapted(config: Any) -> Any:
    """The same as LoRA extends it."""
    return type("Config", (type(config),), {"__module__": "torchtitan.components.lora"})(rank=4)


def attention(
    qkv: str = "QKVLinear", name: str = f"{COMMON}.attention.GQAttention.Config", **parts: Any
) -> Any:
    inner = of(f"{COMMON}.attention.{qkv}.Config", **(parts or {"wk": linear(), "wv": linear()}))
    return of(name, qkv_linear=inner)


def test_the_projections_of_keys_and_values_are_found_by_name_in_either_place() -> None:
    parts = {name: linear() for name in ("wk", "wv", "wkv", "wqkv")}
    assert projections(SimpleNamespace(wq=linear(), **parts)) == parts
    assert projections(SimpleNamespace(qkv_linear=SimpleNamespace(**parts))) == parts


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (attention(), None),
        (attention("FusedQKVLinear", wqkv=linear()), None),
        (of("torchtitan.models.gpt_oss.model.Attention.Config", wk=linear(), wv=linear()), None),
        (
            attention(wk=linear(), wv=linear(f"{QUANTIZATION}.nvfp4.NVFP4Linear.Config")),
            f"its wv is a {QUANTIZATION}.nvfp4.NVFP4Linear.Config",
        ),
        (
            attention(
                wk=linear(f"{QUANTIZATION}.float8.Float8Linear.Config"),
                wv=linear(f"{QUANTIZATION}.mx.MXFP8Linear.Config"),
            ),
            None,
        ),
        (attention(wk=of("anything.KVHead.Config", n_kv_heads=2), wv=linear()), None),
        (attention(wk=adapted(linear()), wv=adapted(linear())), None),
        (
            attention("FusedQKVLinear", wqkv=adapted(linear())),
            "its wqkv has one LoRA adapter, where three projections would have three: another model",
        ),
        (attention("DistGemmQKV"), f"its qkv_linear is a {COMMON}.attention.DistGemmQKV.Config"),
        (attention(name="mine.Attention.Config"), "its attention is a mine.Attention.Config"),
    ],
    ids=[
        "separate",
        "fused",
        "without a module of its own",
        "low precision without an emulation",
        "low precision",
        "converted",
        "adapted",
        "one adapter",
        "another module",
        "another attention",
    ],
)
def test_what_is_not_upstreams_own_is_named(config: Any, problem: str | None) -> None:
    assert problem_with_attention(config) == problem


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("torch.nn.modules.linear.Linear", True),
        ("torchao.float8.float8_linear.Float8Linear", True),
        ("torchao.prototype.mx_formats.mx_linear.MXLinear", True),
        ("mine.linear.Linear", False),
    ],
)
def test_the_built_linears_of_0_2_are_told_by_their_class(name: str, shares: bool) -> None:
    module, _, own = name.rpartition(".")
    assert shares_linear(type(own, (), {"__module__": module, "__qualname__": own})()) is shares


def test_the_option_of_a_patched_torchtitan_is_had_without_ours() -> None:
    with pytest.raises(KVReplicationError) as caught:
        raise_if_untried(SimpleNamespace(replicate_kv_heads=True), None)
    assert str(caught.value) == (
        "KV-head replication is not supported here: parallelism.replicate_kv_heads = true has torchtitan "
        "itself share heads.\n"
        "Without this check the run would be refused as its model is built, whose wk and wv are no plain "
        "linears any more.\n"
        "What works: that option alone, without --replicate-kv-heads, or a tensor parallel degree that "
        "divides n_kv_heads without --replicate-kv-heads."
    )
    raise_if_untried(SimpleNamespace(replicate_kv_heads=False), None)
