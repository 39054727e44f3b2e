"""Shared heads in low precision: what stock computes from as many copies of the heads as ranks, bit for bit.

One process proves little there: stock at TP 2 is itself far from it, as it rounds by the rows of a rank.
"""

from __future__ import annotations

import pytest

from tests.torchrun.conftest import run_ranks
from tests.torchtitan.optional import needs_torchao
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.torchrun import Torchrun

pytestmark = needs_torchao

KINDS = {
    "rowwise:spmd_types": "KVHeadFloat8Linear",
    "rowwise:partial_dtensor": "KVHeadFloat8Linear",
    "tensorwise:spmd_types": "KVHeadFloat8Linear",
    "tensorwise:full_dtensor": "KVHeadFloat8Linear",
    "mxfp8:spmd_types": "KVHeadMXFP8Linear",
}
if installed_line().BACKENDS["qwen3"] == (None,):
    KINDS = {
        "rowwise": "KVHeadFloat8Linear",
        "tensorwise": "KVHeadFloat8Linear",
        "mxfp8": "KVHeadMXLinear",
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Torchrun:
    return run_ranks("tests.torchrun.twins", *KINDS, nproc=2, folder=tmp_path_factory.mktemp("twins"))


@pytest.mark.xdist_group("twins")
@pytest.mark.parametrize("pair", KINDS)
def test_shared_heads_are_the_same_as_their_duplicated_twin(compared: Torchrun, pair: str) -> None:
    # 11 weights of each of two layers, the embedding and the last norm; the head is that of the embedding.
    said = [f"rank {rank}: {pair}: {KINDS[pair]}: 24 equal" for rank in range(2)]
    assert [compared.output.count(line) for line in said] == [1, 1], compared
