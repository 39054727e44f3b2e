"""Start a real torchrun, bound its time, and leave nothing of it behind.

Linux only: what is left is found by the environment of every process in /proc.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARKER = "TP_VALIDATE_TORCHRUN"
_GRACE_SECONDS = 15.0
_WATCH_SECONDS = 0.25


@dataclass(frozen=True)
class Torchrun:
    """The end of a torchrun. Its text is everything that a failure needs to be understood.

    Attributes:
        leftover: processes that were still alive after torchrun had ended; all were killed.
        reports: what ranks wrote to ``rank*.json``, by rank; one that was killed wrote nothing.
    """

    command: tuple[str, ...]
    returncode: int
    output: str
    timed_out: bool
    seconds: float
    reports: tuple[dict[str, Any], ...]
    leftover: tuple[int, ...]

    def __str__(self) -> str:
        ended = "timed out" if self.timed_out else f"ended with status {self.returncode}"
        reports = "\n".join(json.dumps(report) for report in self.reports) or "none"
        return (
            f"{' '.join(self.command)}\n{ended} after {self.seconds:.1f} s, "
            f"processes left behind: {list(self.leftover)}\n"
            f"--- reports\n{reports}\n--- output\n{self.output}"
        )

    __repr__ = __str__


def run_torchrun(
    arguments: Sequence[str],
    *,
    nproc: int,
    timeout: float,
    out: Path,
    module: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    watch: Callable[[], bool] = lambda: True,
) -> Torchrun:
    """Run ``torchrun --nproc-per-node NPROC -m MODULE ARGUMENTS`` to its end, or kill it.

    Its output goes to `out`. Runs wait for each other, also across processes, and the time limit starts
    when a run does. `watch` is called all along, and ends the run by returning False.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("rank*.json"):
        stale.unlink()
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        # Standalone asks the system for a free port by itself: none is picked here and lost meanwhile.
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(nproc)),
        *("-m", module, *arguments),
    ]
    run_id = uuid.uuid4().hex
    with _one_at_a_time():
        started = time.monotonic()
        try:
            returncode, output, timed_out = _run(command, cwd, _environment(run_id, env), out, timeout, watch)
        finally:
            leftover = _kill_leftover(run_id)
        seconds = time.monotonic() - started
    reports = [
        report for path in out.glob("rank*.json") for report in json.loads(path.read_text(encoding="utf-8"))
    ]
    reports.sort(key=lambda report: report["rank"])
    return Torchrun(tuple(command), returncode, output, timed_out, seconds, tuple(reports), leftover)


def _environment(run_id: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # gloo would look for the address of the host name, which need not have one.
        "GLOO_SOCKET_IFNAME": "lo",
        **(extra or {}),
        # torchrun puts every worker in a session of its own: what they all inherit is this.
        _MARKER: run_id,
    }


def _run(
    command: Sequence[str],
    cwd: Path | None,
    env: Mapping[str, str],
    out: Path,
    timeout: float,
    watch: Callable[[], bool],
) -> tuple[int, str, bool]:
    log = out / "output.txt"
    timed_out = False
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + timeout
        try:
            while process.poll() is None and not timed_out:
                time.sleep(_WATCH_SECONDS)
                timed_out = not watch() or time.monotonic() > deadline
        finally:
            _stop(process)
    return process.returncode, log.read_text(encoding="utf-8", errors="replace"), timed_out


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun as a scheduler would: a signal that lets it take its workers along, then force."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _kill_leftover(run_id: str) -> tuple[int, ...]:
    """Kill what is left of a run until nothing is; return the processes that had to be killed."""
    # A worker that has just been told to end may need a moment to disappear.
    deadline = time.monotonic() + 2.0
    while (left := _processes_of(run_id)) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed = set(left)
    deadline = time.monotonic() + _GRACE_SECONDS
    while left := _processes_of(run_id):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} survive SIGKILL")
        for pid in left:
            killed.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return tuple(sorted(killed))


def _processes_of(run_id: str) -> list[int]:
    marker = f"{_MARKER}={run_id}".encode()
    if not Path("/proc/self/environ").exists():
        raise RuntimeError("/proc cannot be read, so processes left behind would not be seen")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:
            # Ended meanwhile, or another user's.
            continue
        if marker in environment.split(b"\0"):
            found.append(int(process.name))
    return found


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two torchruns side by side on a small machine starve each other into timeouts."""
    lock = Path(tempfile.gettempdir()) / f"tp-validate-torchrun-{os.getuid()}.lock"
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
