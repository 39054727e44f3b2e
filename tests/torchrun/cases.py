"""The families, and how the tests that prove the mission run them under torchrun."""

from __future__ import annotations

from pathlib import Path

from tests.torchrun import lines
from tests.torchrun.harness import Result, run_torchrun

FAMILIES = lines.installed_line().FAMILIES
_TIMEOUT = 420


def run(tmp_path: Path, *arguments: str, tp: int) -> Result:
    """Run the worker on as many ranks as the tensor parallel degree, to an end that leaves nothing behind."""
    result = run_torchrun([*arguments, "--tp", str(tp)], nproc=tp, timeout=_TIMEOUT, out=tmp_path)
    assert not result.timed_out, result
    assert not result.leftover, result
    return result
