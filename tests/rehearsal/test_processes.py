"""A rehearsal as a process: what it leaves, what it keeps, what it raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.rehearse import assert_equal_to_one_process, rehearse
from torchtitan_tp_validate.rehearsal.told import whole_text

TP_2 = {"tensor_parallel_degree": 2}


def test_a_job_that_torchtitan_does_not_take_cannot_be_rehearsed() -> None:
    with pytest.raises(RehearsalError, match=r"^torchtitan does not take the job"):
        rehearse(["--nonsense", "1"])


def test_one_line_asserts_it_in_a_test_of_one_s_own() -> None:
    with pytest.raises(AssertionError, match=r"^llama3 8B at tp 3: dies\n"):
        assert_equal_to_one_process(model="llama3", flavor="8B", degrees={"tensor_parallel_degree": 3})


def test_what_is_kept_repeats_the_rehearsal(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    seen = assert_equal_to_one_process(model="llama3", flavor="8B", degrees=TP_2, ranks=2, keep=kept)
    with pytest.raises(RehearsalError) as caught:
        rehearse(model="llama3", flavor="8B", keep=kept)
    assert str(caught.value) == f"{kept} is not empty: what is in it is not overwritten."
    gradients = torch.load(kept / "microbatch-1-accumulated" / "rehearsal-rank1.pt")["steps"]
    wanted = torch.load(kept / "microbatch-1-accumulated" / "reference.pt")["steps"]
    assert [step.keys() for step in gradients] == [step.keys() for step in wanted]
    ended = subprocess.run([sys.executable, kept / "repeat.py"], capture_output=True, text=True, check=True)
    assert ended.stdout == whole_text(seen) + "\n"


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_rehearsal_whose_process_ends(tmp_path: Path, by: signal.Signals) -> None:
    model = ["--model", "llama3", "--flavor", "8B", "--tp", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchtitan_tp_validate", "rehearse", *model],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Ranks have logs as soon as they are there.
    _until(lambda: any(tmp_path.glob("*/*/*.log")))
    process.send_signal(by)
    process.wait(60)
    _until(lambda: not any(tmp_path.iterdir()) and not _processes_of(tmp_path))


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _processes_of(folder: Path) -> list[str]:
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = command.read_text(encoding="utf-8", errors="replace")
        except OSError:  # ended meanwhile
            continue
        if str(folder) in text:
            found.append(text)
    return found
