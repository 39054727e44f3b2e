"""A shrunk model gets the verdicts of the model that it stands for, and is small enough for a laptop."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from importlib.metadata import version
from typing import Any

import pytest

from torchtitan_tp_validate import registry
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import Plan
from torchtitan_tp_validate.rehearsal.shrink import ShrinkError, same_remainders, shrink
from torchtitan_tp_validate.releases import read_plan

if not version("torchtitan").startswith("0.3"):
    pytest.skip("torchtitan 0.3.x describes its models by config trees", allow_module_level=True)

FAMILIES = ("llama3", "qwen3", "qwen3_5", "deepseek_v3", "gpt_oss", "kimi_k2_7", "muse_glimmer")
LAYOUTS = [
    Degrees(tp=tp, ep=ep, dp_shard=dp_shard, spmd_backend=backend)
    for tp, ep, dp_shard in itertools.product((1, 3, 4, 16), (1, 2, 8, 12), (1, 3, 24, 256))
    for backend in ("spmd_types", "partial_dtensor")
]
NO_DEGREES = Degrees(tp=1)


def flavors(family: str) -> dict[str, Any]:
    model = registry.model(family)
    return {flavor: model.spec(flavor).model for flavor in model.flavors}


def codes(plan: Plan, degrees: Degrees) -> set[str]:
    return {dim.code for dim in plan.violations(degrees)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_gets_the_same_verdicts_at_every_tp_degree(family: str) -> None:
    for flavor, config in flavors(family).items():
        full = read_plan(config, NO_DEGREES)
        refused = 0
        for tp in range(1, 65):
            degrees = Degrees(tp=tp)
            expected = codes(full, degrees)
            assert codes(read_plan(shrink(config, degrees), degrees), degrees) == expected, (flavor, tp)
            refused += bool(expected)
        assert 0 < refused < 64, flavor


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "gpt_oss"])
def test_and_with_expert_and_data_parallelism_on_every_kind_of_backend(family: str) -> None:
    found: set[str] = set()
    for flavor, config in flavors(family).items():
        full = read_plan(config, NO_DEGREES)
        for degrees in LAYOUTS:
            if degrees.makes_a_mesh:
                expected = codes(full, degrees)
                assert codes(read_plan(shrink(config, degrees), degrees), degrees) == expected, (
                    flavor,
                    degrees,
                )
                found |= expected
    assert {"EP001", "FSDP001"} <= found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_has_one_layer_of_each_kind_and_fits_a_laptop(family: str) -> None:
    torch = pytest.importorskip("torch")
    for flavor, config in flavors(family).items():
        before = copy.deepcopy(config)
        small = shrink(config, Degrees(tp=2, ep=2, dp_shard=2))
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in small.build().parameters())
        assert parameters < 150e6, flavor
        assert len(small.layers) <= 2, flavor
        assert set(map(parts, small.layers)) == set(map(parts, config.layers)), flavor
        assert repr(config) == repr(before), flavor


def parts(layer: Any) -> frozenset[str]:
    """What a layer is made of."""
    return frozenset(
        name for name in ("attention", "delta_net", "feed_forward", "moe") if getattr(layer, name, None)
    )


def test_a_linear_that_may_read_or_write_the_residual_stream_is_named() -> None:
    config = registry.model("qwen3").spec("30B-A3B").model
    attention = config.layers[0].attention
    own = dataclasses.make_dataclass("Own", ["attention", "adapter"])
    config.layers = [own(attention, copy.deepcopy(attention.wo))]
    with pytest.raises(ShrinkError) as caught:
        shrink(config, Degrees(tp=2))
    assert str(caught.value) == (
        "layers[0].adapter is 4096 by 2048, and the model's dim is 2048: it is not known whether it reads or "
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
