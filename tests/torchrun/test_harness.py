"""The harness kills what hangs and finds what is left behind, or no other test here proves anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torchrun.harness import REPOSITORY, run_torchrun


def run_module(tmp_path: Path, body: str, *, timeout: float):  # type: ignore[no-untyped-def]
    (tmp_path / "throwaway.py").write_text(body, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    return run_torchrun(
        [], nproc=2, timeout=timeout, out=tmp_path, cwd=tmp_path, module="throwaway", env={"PYTHONPATH": path}
    )


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    # An orphan that was killed stays listed where the first process does not collect it.
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_ranks_that_hang_are_killed_at_the_time_limit_and_their_output_is_kept(tmp_path: Path) -> None:
    # One write each: what both ranks print in pieces would run together.
    body = "import os, time\nos.write(1, f'rank with pid {os.getpid()}\\n'.encode())\ntime.sleep(600)\n"
    result = run_module(tmp_path, body, timeout=30)
    assert result.timed_out
    assert result.returncode != 0
    pids = [int(line.split()[-1]) for line in result.output.splitlines() if line.startswith("rank ")]
    assert len(pids) == 2, result
    assert not any(map(alive, pids)), result
    assert "timed out" in str(result)


def test_a_process_that_outlives_its_rank_is_reported_and_killed(tmp_path: Path) -> None:
    body = "import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    result = run_module(tmp_path, body, timeout=60)
    assert result.returncode == 0, result
    assert len(result.leftover) == 2, result
    assert not any(map(alive, result.leftover)), result


@pytest.mark.parametrize("status", [0, 3])
def test_the_end_of_the_ranks_is_told(tmp_path: Path, status: int) -> None:
    result = run_module(tmp_path, f"print('said'); raise SystemExit({status})\n", timeout=60)
    assert not result.timed_out
    assert (result.returncode == 0) is (status == 0), result
    assert result.leftover == ()
    assert result.output.count("said") == 2
