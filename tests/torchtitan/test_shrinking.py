"""A shrunk model gets the verdicts of the model that it stands for, and is small enough for a laptop."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchtitan_tp_validate import registry
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import ShrinkError
from torchtitan_tp_validate.models import FAMILY_OF
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.rehearsal.shrink import same_remainders, shrink
from torchtitan_tp_validate.releases import read_plan

FAMILIES = sorted(FAMILY_OF.keys() & set(registry.names()))
WITH_EXPERTS = [family for family in ("qwen3", "deepseek_v3", "gpt_oss") if family in FAMILIES]
LAYOUTS = [
    Degrees(tp=tp, ep=ep, dp_shard=dp_shard, spmd_backend=backend)
    for tp, ep, dp_shard in itertools.product((1, 3, 4), (1, 2, 12), (1, 24, 256))
    for backend in ("spmd_types", "partial_dtensor")
]
IS_TREE = registry.has_configs()
PARTS = ("attention", "delta_net", "feed_forward", "moe")


def flavors(family: str) -> Iterator[tuple[str, Any]]:
    """The flavors with a config (0.3.x) or model args (0.2.x) of their own, and these."""
    model = registry.model(family)
    seen = set()
    for flavor in model.flavors:
        config = model.spec(flavor).config
        if repr(config) not in seen:
            seen.add(repr(config))
            yield flavor, config


def build(family: str, config: Any) -> Any:
    """The model on meta."""
    with torch.device("meta"):
        if IS_TREE:
            return config.build()
        from torchtitan.protocols.train_spec import get_train_spec

        config.moe_impl = "standard"  # deepseek_v3 of 0.2.2 takes it from the job
        return get_train_spec(family).model_cls(config)


def read(family: str, config: Any, degrees: Degrees) -> Plan:
    """The plan; of a built model where the args alone tell too little."""
    return read_plan(config if IS_TREE else build(family, config), degrees)


def codes(plan: Plan, degrees: Degrees) -> set[str]:
    return {dim.code for dim in plan.violations(degrees)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_gets_the_same_verdicts_at_every_tp_degree(family: str) -> None:
    for flavor, config in flavors(family):
        full = read(family, config, Degrees(tp=1))
        refused = 0
        for tp in range(1, 65):
            degrees = Degrees(tp=tp)
            expected = codes(full, degrees)
            found = codes(read(family, shrink(config, degrees), degrees), degrees)
            assert found == expected, (flavor, tp)
            refused += bool(expected)
        assert 0 < refused < 64, flavor


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_and_with_expert_and_data_parallelism_on_every_kind_of_backend(family: str) -> None:
    seen: set[str] = set()
    for flavor, config in flavors(family):
        full = read(family, config, Degrees(tp=1))
        for degrees in filter(lambda layout: layout.makes_a_mesh, LAYOUTS):
            expected = codes(full, degrees)
            found = codes(read(family, shrink(config, degrees), degrees), degrees)
            assert found == expected, (flavor, degrees)
            seen |= expected
    assert {"EP001", "FSDP001"} <= seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_has_a_layer_of_each_kind_and_fits_a_laptop(family: str) -> None:
    for flavor, config in flavors(family):
        before = copy.deepcopy(config)
        small = build(family, shrink(config, Degrees(tp=2, ep=2, dp_shard=2)))
        assert sum(parameter.numel() for parameter in small.parameters()) < 150e6, flavor
        assert len(small.layers) <= 4, flavor
        assert kinds(small) == kinds(build(family, copy.copy(config))), flavor
        assert repr(config) == repr(before), flavor


def kinds(model: Any) -> set[tuple[str, ...]]:
    """What the layers of a model are made of."""
    return {tuple(part for part in PARTS if getattr(layer, part, None)) for layer in model.layers.values()}


@pytest.mark.requires(torchtitan="0.3")  # 0.2.x has no tree of configs
def test_a_linear_that_may_read_or_write_the_residual_stream_is_named() -> None:
    config = registry.model("qwen3").spec("30B-A3B").config
    attention = config.layers[0].attention
    own = dataclasses.make_dataclass("Own", ["attention", "adapter"])
    adapter = dataclasses.replace(attention.wo, in_features=config.dim)
    config.layers = [own(attention, adapter)]
    with pytest.raises(ShrinkError) as caught:
        shrink(config, Degrees(tp=2))
    assert str(caught.value) == (
        "layers[0].adapter is 2048 by 2048, and the model's dim is 2048: it is not known whether it reads or "
        "writes the residual stream."
    )


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7, 8, 64])
def test_the_smallest_size_leaves_the_same_remainder_and_no_rank_empty(degree: int) -> None:
    degrees = Degrees(tp=degree)
    for size in (9, 64, 65, 193, 4096, 14336, 151936, 248320):
        small = same_remainders(size, degrees)
        assert small <= size
        assert small % (8 * degree) == size % (8 * degree)
        assert small == size or small < max(64, degree**2) + 8 * degree
        assert (-(-small // degree) * (degree - 1) < small) == (-(-size // degree) * (degree - 1) < size)
