"""What hangs is killed, and what is left behind is found, or no other test here proves anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtitan_tp_validate.rehearsal.torchrun import Torchrun, run_torchrun


def run_module(tmp_path: Path, body: str, *, timeout: float = 60, **how: Any) -> Torchrun:
    (tmp_path / "throwaway.py").write_text(body, encoding="utf-8")
    return run_torchrun([], nproc=2, timeout=timeout, out=tmp_path, cwd=tmp_path, module="throwaway", **how)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    # An orphan that was killed stays listed where the first process does not collect it.
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_ranks_that_hang_are_killed_and_their_output_is_kept(tmp_path: Path) -> None:
    # One write each: what both ranks print in pieces would run together.
    body = "import os, time\nos.write(1, f'rank with pid {os.getpid()}\\n'.encode())\ntime.sleep(600)\n"

    def pids() -> list[int]:
        lines = (tmp_path / "output.txt").read_text(encoding="utf-8").splitlines()
        return [int(line.split()[-1]) for line in lines if line.startswith("rank ")]

    result = run_module(tmp_path, body, watch=lambda: len(pids()) < 2)
    assert result.timed_out
    assert result.returncode != 0
    assert len(pids()) == 2, result
    assert not any(map(alive, pids())), result
    assert "timed out" in str(result)
    assert str(pids()[0]) in result.output


def test_a_run_is_ended_at_its_time_limit(tmp_path: Path) -> None:
    result = run_module(tmp_path, "import time\ntime.sleep(600)\n", timeout=0.5)
    assert result.timed_out
    assert result.returncode != 0
    assert result.seconds < 60


def test_a_process_that_outlives_its_rank_is_reported_and_killed(tmp_path: Path) -> None:
    body = "import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    result = run_module(tmp_path, body)
    assert result.returncode == 0, result
    assert not result.timed_out
    assert len(result.leftover) == 2, result
    assert not any(map(alive, result.leftover)), result


def test_the_end_of_ranks_that_fail_is_told(tmp_path: Path) -> None:
    # torchrun stops the other rank as soon as one has failed.
    body = (
        "import os, time\nfrom pathlib import Path\n"
        "print('said')\nPath(f'said-{os.environ[\"RANK\"]}').touch()\n"
        "while len(list(Path().glob('said-*'))) < 2:\n    time.sleep(0.02)\n"
        "raise SystemExit(3)\n"
    )
    result = run_module(tmp_path, body)
    assert not result.timed_out
    assert result.returncode != 0, result
    assert result.leftover == ()
    assert result.output.count("said") == 2
