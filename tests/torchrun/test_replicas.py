"""Copies of a parameter that drift apart stop the run, on every rank that has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torchrun.conftest import run_ranks

pytestmark = pytest.mark.requires(torchtitan=("0.2.2", "0.3.0"))


@pytest.mark.parametrize("how", ["equal", "drift"])
def test_copies_that_differ_are_named_and_those_that_do_not_are_let_alone(how: str, tmp_path: Path) -> None:
    result = run_ranks("tests.torchrun.replicas", how, nproc=2, folder=tmp_path)
    assert result.returncode == 0, result
    said = (
        "equal"
        if how == "equal"
        else (
            "The copies of norm on the 2 ranks of the tp axis are no longer equal after step 4: rank 1 has "
            "another. A gradient of it is not reduced over that axis, and the run trains silently wrong. "
            "`tp-validate rehearse` says which fault it may be."
        )
    )
    # Two ranks may share a line.
    assert [result.output.count(f"rank {rank}: {said}") for rank in range(2)] == [1, 1], result
