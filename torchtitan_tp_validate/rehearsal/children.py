"""Run a function in forks of this process, as ranks, and tell how each ended.

This process has imported torch and torchtitan already, which takes longer than all that the ranks do. It
hosts the store that they meet at, watches them, and kills what does not end. Linux only.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 3.0
"""For the other ranks to end when one of them has raised."""
_SHARE_AT_WORK = 0.1
"""Of one core, for ranks that compute; those that wait for each other use next to none, all together."""
_MOST_PATIENCES = 20
"""How long a stage may take at the most, for ranks that compute without an end."""


@dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        rank: which one.
        how: ``ended``, ``raised``, ``killed`` (by a signal of its own), ``waited`` (for others, when one of
            them had raised) or ``hung``.
        stage: where it was.
        error: class and text of what it raised; traceback: the same with its way; or, of a rank that hung,
            where it was waiting.
    """

    rank: int
    how: str
    stage: str
    error: str = ""
    traceback: str = ""


class Children:
    """Groups of ranks, one after the other.

    Args:
        out: where they write: ``NAME-rank0.log`` and so on.
        patience: seconds for which the ranks may stay where they are, and compute nothing to speak of.
    """

    def __init__(self, out: Path, patience: float) -> None:
        self._out = out
        self._patience = patience

    def run(self, name: str, ranks: int, function: Callable[[int, Callable[[str], None]], Any]) -> list[End]:
        """Run ``function(rank, enter)`` in a fork per rank; ``enter`` is to be told where it is."""
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        files = [self._out / f"{name}-rank{rank}" for rank in range(ranks)]
        for file in files:
            for stale in self._out.glob(f"{file.name}.*"):
                stale.unlink()
        environment = {
            **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
            # There is one CPU.
            "LOCAL_RANK": "0",
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
            # It is there already: no rank is to host it.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            # gloo would look for the address of the host name, which need not have one.
            "GLOO_SOCKET_IFNAME": "lo",
        }
        # Or else torchtitan's own collections copy all that is imported into every rank, which takes seconds.
        gc.freeze()
        # The store looks up the name of whoever connects, under a lock of libc. Were a rank forked meanwhile,
        # it would have the lock taken, and wait for ever as it connects itself: all begin after the last.
        begin, all_forked = os.pipe()

        def after_the_last(rank: int, enter: Callable[[str], None]) -> None:
            os.close(all_forked)
            os.read(begin, 1)
            function(rank, enter)

        pids = [self._fork(files[rank], rank, environment, after_the_last) for rank in range(ranks)]
        os.close(all_forked)
        os.close(begin)
        try:
            how = self._wait(files, pids)
        finally:
            for pid in pids:
                _kill(pid)
        return [self._end(file, rank, how[rank]) for rank, file in enumerate(files)]

    def _fork(
        self,
        file: Path,
        rank: int,
        environment: Mapping[str, str],
        function: Callable[[int, Callable[[str], None]], Any],
    ) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            die_with_parent()
            _write_output_to(file.with_suffix(".log"))
            stacks = file.with_suffix(".stack").open("w")
            faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
            os.environ.update(environment, RANK=str(rank))
            function(rank, lambda stage: _write(file.with_suffix(".stage"), stage))
            status = 0
        except BaseException as error:
            way = traceback.format_exc()
            _write(file.with_suffix(".error"), f"{type(error).__name__}: {error}\0{way}")
        finally:
            # Nothing less ends a process that has a collective under way.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _wait(self, files: Sequence[Path], pids: Sequence[int]) -> list[str]:
        """Wait until all have ended or nothing goes on; return how each ended."""
        how = [""] * len(pids)
        raised: float | None = None
        last, entered = "", time.monotonic()
        work = _Work(pids, self._patience)
        while not all(how):
            for rank, pid in enumerate(pids):
                if not how[rank] and os.waitpid(pid, os.WNOHANG)[0]:
                    how[rank] = self._how(files[rank])
                    if how[rank] != "ended":
                        raised = raised or time.monotonic()
            stages = "".join(_read(file.with_suffix(".stage")) for file in files)
            now = time.monotonic()
            if stages != last:
                last, entered = stages, now
            if raised and now - raised > _GRACE_SECONDS:
                return [one or "waited" for one in how]
            idle = now - max(entered, work.last_seen(now))
            if idle > self._patience or now - entered > _MOST_PATIENCES * self._patience:
                for rank, pid in enumerate(pids):
                    if not how[rank]:
                        os.kill(pid, signal.SIGUSR1)
                time.sleep(0.5)
                return [one or "hung" for one in how]
            time.sleep(_LOOK_SECONDS)
        return how

    def _how(self, file: Path) -> str:
        if file.with_suffix(".error").exists():
            return "raised"
        return "ended" if file.with_suffix(".json").exists() else "killed"

    def _end(self, file: Path, rank: int, how: str) -> End:
        error, _, way = _read(file.with_suffix(".error")).partition("\0")
        if how == "hung":
            way = _read(file.with_suffix(".stack"))
        return End(rank, how, _read(file.with_suffix(".stage")), error, way)


class _Work:
    """When processes were last seen to compute, by the CPU seconds that they have used.

    Args:
        pids: of the processes; one that has ended computes nothing.
        patience: seconds of which they are looked at four times.
    """

    def __init__(self, pids: Sequence[int], patience: float) -> None:
        self._pids = pids
        self._window = patience / 4
        self._seen = self._looked = time.monotonic()
        self._used = [0.0] * len(pids)

    def last_seen(self, now: float) -> float:
        """Return the end of the last window in which they computed for a share of it."""
        if now - self._looked > self._window:
            used = [
                max(before, _cpu_seconds(pid)) for pid, before in zip(self._pids, self._used, strict=True)
            ]
            if sum(used) - sum(self._used) > _SHARE_AT_WORK * (now - self._looked):
                self._seen = now
            self._used, self._looked = used, now
        return self._seen


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, none once it is gone."""
    # The name in front of the counts may have spaces.
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def run_in_fork(function: Callable[[], None], log: Path) -> None:
    """Run a function in a fork of this process, whose output goes into a file, and wait for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        die_with_parent()
        _write_output_to(log)
        function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def current_stage(folder: Path) -> str:
    """Return where the first rank of a run is, in a folder that is being written below."""
    stages = sorted(folder.glob("**/*-rank0.stage"), key=lambda path: path.stat().st_mtime)
    return f"{stages[-1].name.partition('-')[0]}: {_read(stages[-1])}" if stages else "importing torchtitan"


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Have this process sent a signal as soon as its parent is gone, however that ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:
        os.kill(os.getpid(), by)


def _write_output_to(file: Path) -> None:
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return  # it had ended


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(f"{path.suffix}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.rename(path)
