"""Hugging Face weights of Llama 3 whose heads are split: stock dies, the repair is right."""

from __future__ import annotations

import pytest

from tests.core.test_layout import run
from tests.torchrun.conftest import run_ranks
from torchtitan_tp_validate.faults import find_faults
from torchtitan_tp_validate.rehearsal.torchrun import Torchrun

LAYOUTS = {
    # FSDP : TP : heads
    "4:1:4": True,
    "4:1:8": True,
    "2:2:4": True,
    "2:2:8": True,
    "1:4:4": True,
    "4:1:2": False,
    "4:1:6": False,
    "2:2:2": False,
    "2:2:6": False,
}
"""Layout of four ranks -> whether stock can save and load."""


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Torchrun:
    folder = tmp_path_factory.mktemp("weights")
    return run_ranks("tests.torchrun.permuting", str(folder), *LAYOUTS, nproc=4, folder=folder)


@pytest.mark.xdist_group("weights")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_repair_saves_and_loads_what_stock_cannot(exchanged: Torchrun, layout: str) -> None:
    fsdp, tp, heads = map(int, layout.split(":"))
    asked = run(dp_shard=fsdp, tp=tp, permuted_heads=heads, faults=frozenset({"CKPT001"}))
    assert LAYOUTS[layout] is (find_faults(asked) == ())
    for rank in range(4):
        assert f"rank {rank}: repaired {layout} right\n" in exchanged.output, exchanged
        stock = f"rank {rank}: stock {layout} "
        assert (f"{stock}right\n" in exchanged.output) is LAYOUTS[layout], exchanged
        assert f"{stock}wrong\n" not in exchanged.output, exchanged
