"""Shared heads in low precision: what stock computes from as many copies of the heads as ranks, bit for bit.

One process proves little there: stock at TP 2 is itself far from it, as it rounds by the rows of a rank.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torchtitan.optional import needs_torchao
from torchtitan_tp_validate.rehearsal.torchrun import run_torchrun

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.requires(torchtitan="0.3"), needs_torchao]


@pytest.mark.parametrize(
    ("precision", "backend", "kind"),
    [
        ("rowwise", "spmd_types", "KVHeadFloat8Linear"),
        ("rowwise", "partial_dtensor", "KVHeadFloat8Linear"),
        ("tensorwise", "spmd_types", "KVHeadFloat8Linear"),
        ("mxfp8", "spmd_types", "KVHeadMXFP8Linear"),
    ],
)
def test_shared_heads_are_the_same_as_their_duplicated_twin(
    precision: str, backend: str, kind: str, tmp_path: Path
) -> None:
    result = run_torchrun(
        [precision, backend],
        nproc=2,
        timeout=300,
        out=tmp_path,
        cwd=tmp_path,
        module="tests.torchrun.twins",
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert result.returncode == 0, result
    # 11 weights of each of two layers, the embedding and the last norm; the head is that of the embedding.
    said = [f"rank {rank}: {kind}: 24 equal" for rank in range(2)]
    assert [result.output.count(line) for line in said] == [1, 1], result
