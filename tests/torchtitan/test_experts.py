"""The rules of routed experts against torchtitan's own FSDP and torch's own kernel.

The ranks are made up: torch's fake process group lets one process play one of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import silu
from torch.testing._internal.distributed.fake_pg import FakeStore

import torchtitan_tp_validate as tpv
from tests.torchtitan.installed import SPMD_BACKENDS
from torchtitan_tp_validate.rehearsal.models import TinyModel, installed_line
from torchtitan_tp_validate.rules import ALIGNMENT


@contextmanager
def made_up_ranks(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchtitan.tools.utils", "torchtitan.distributed.parallel_dims"):
        monkeypatch.setattr(f"{module}.device_type", "cpu")


BACKENDS = SPMD_BACKENDS or (None,)
# family, backend, ranks, TP, EP, experts, their hidden size
RUNS = [
    (family, backend, *run)
    for family in ("qwen3_moe", "gpt_oss")
    for backend in BACKENDS
    for run in (
        (8, 2, 1, 4, 64),
        (8, 2, 1, 4, 36),
        (8, 2, 1, 3, 34),
        (8, 2, 1, 8, 34),
        (8, 2, 2, 4, 36),
        (8, 2, 2, 4, 34),
        (8, 1, 2, 4, 34),
        (8, 1, 2, 8, 34),
    )
]


# 0.2.0 and 0.2.1 have no gpt_oss, and their FSDP wants a TP mesh where there is no TP.
@pytest.mark.requires(torchtitan=("0.2.2", "0.3"))
@pytest.mark.parametrize(("family", "backend", "world_size", "tp", "ep", "num_experts", "hidden"), RUNS)
def test_fsdp_refuses_what_the_rule_does(
    family: str, backend: str | None, world_size: int, tp: int, ep: int, num_experts: int, hidden: int
) -> None:
    tiny = installed_line().build(
        family,
        n_heads=8,
        n_kv_heads=4,
        tp=tp,
        ep=ep,
        upstream_check=False,
        sizes={"num_experts": num_experts, "expert_hidden": hidden},
        spmd_backend=backend,
    )
    with made_up_ranks(world_size):
        parallel_dims = tiny.make_parallel_dims(tp, world_size)
        codes = refused_codes(tiny, parallel_dims)
        assert codes <= {"FSDP001"}
        if codes:
            with pytest.raises(NotImplementedError, match="FSDP does not support uneven sharding on dim 1"):
                parallelize(tiny, parallel_dims)
        else:
            parallelize(tiny, parallel_dims)


def refused_codes(tiny: TinyModel, parallel_dims: object) -> set[str]:
    try:
        tpv.validate_tp_compat(tiny.model, parallel_dims)
    except tpv.TPCompatError as error:
        return {violation.code for violation in error.violations}
    return set()


def parallelize(tiny: TinyModel, parallel_dims: object) -> None:
    args, kwargs = tiny.arguments(parallel_dims)
    tiny.parallelize_fn(tiny.model, *args, **kwargs)


@pytest.mark.parametrize("hidden", [32, 36, 40, 47])
def test_the_grouped_kernel_takes_hidden_sizes_of_whole_16_bytes(hidden: int) -> None:
    ends = torch.tensor([4, 16], dtype=torch.int32)
    first, second = torch.ones(2, hidden, 64), torch.ones(2, 64, hidden)

    def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(rows, weight.bfloat16().transpose(-2, -1), offs=ends)

    inner = silu(multiply(torch.ones(16, 64).bfloat16(), first))
    if hidden % ALIGNMENT:
        with pytest.raises(RuntimeError, match="strides should be multiple of 16 bytes"):
            multiply(inner, second)
    else:
        assert multiply(inner, second).shape == (16, 64)
