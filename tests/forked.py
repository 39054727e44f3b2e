"""Run modules in forks of a process that has imported what torchtitan imports, but nothing of torchtitan.

    python -m tests.forked

Importing torch and the rest takes ten times as long as most of what a test starts a process for. torchtitan
and this package are imported after the fork, in the order in which a process of its own would import them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# What is there of it.
IMPORTED = (
    *("torch", "torch.distributed.run", "torch.distributed.tensor.parallel", "torch.distributed.pipelining"),
    *("torch.distributed.checkpoint.state_dict", "torch._inductor.compile_fx", "datasets", "transformers"),
    *("tokenizers", "torchao", "tyro", "spmd_types", "torchdata.stateful_dataloader", "wrapt"),
    "torch.utils.tensorboard",
)
IMPORTED_BY_TRANSFORMERS = (
    "torch.distributed.run",
    "torch.distributed.tensor",
    "transformers.generation.utils",
)
"""The same where there is no torchtitan."""

in_forks = pytest.mark.xdist_group("forks")
"""For the tests of a folder: one worker starts the process that forks."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 2.0
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    Attributes:
        output: what it and its children wrote to standard output, and to standard error in a torchrun.
        errors: what was written to standard error else.
        leftover: processes that it had started and that outlived it; all were killed.
    """

    returncode: int
    output: str
    errors: str
    timed_out: bool
    leftover: tuple[int, ...]


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    out: Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> Ended:
    """Run ``python -m MODULE ARGUMENTS``."""
    return _run(module, arguments, out, cwd, env, timeout)


def run_program(module: str, out: Path) -> None:
    """Run a program of the tests, which reads and writes the files of a folder, to its good end."""
    ended = run_module(module, [str(out)], out=out / "ended", timeout=900)
    assert ended.returncode == 0, ended


def run_script(name: str, *arguments: str, out: Path) -> list[str]:
    """Run a script of ``scripts/`` to its good end; return the lines that it prints."""
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = run_module(name, arguments, out=out, cwd=ROOT / "scripts", env=told)
    assert ended.returncode == 0, ended
    return ended.output.splitlines()


def run_torchrun(
    module: str,
    arguments: Sequence[str],
    *,
    nproc: int,
    out: Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> Ended:
    """Run ``torchrun --nproc-per-node NPROC -m MODULE ARGUMENTS``: torch's agent, its ranks forks."""
    told = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    return _run(module, arguments, out, cwd, told, timeout, nproc)


def _run(
    module: str,
    arguments: Sequence[str],
    out: Path,
    cwd: Path,
    env: Mapping[str, str] | None,
    timeout: float,
    nproc: int = 0,
) -> Ended:
    out.mkdir(parents=True, exist_ok=True)
    request = {
        **{"module": module, "arguments": list(arguments), "nproc": nproc, "cwd": str(cwd), "out": str(out)},
        **{"env": {**os.environ, **(env or {})}, "timeout": timeout},
    }
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(f"{json.dumps(request)}\n")
    parent.stdin.flush()
    told = json.loads(parent.stdout.readline())
    texts = [
        path.read_text(encoding="utf-8", errors="replace") if (path := out / name).exists() else ""
        for name in ("output.txt", "errors.txt")
    ]
    return Ended(told["returncode"], *texts, told["timed_out"], tuple(told["leftover"]))


@functools.cache
def _parent() -> subprocess.Popen[str]:
    """Start the process that forks; it ends with its standard input, and so with this one."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.forked"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def close() -> None:
        parent.communicate()

    atexit.register(close)
    return parent


def main() -> None:
    """Fork for every line of standard input, and say on standard output how each fork ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what importing says
    gc.disable()
    for name in IMPORTED if find_spec("torchtitan") else IMPORTED_BY_TRANSFORMERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not {"torchtitan", "torchtitan_tp_validate"} & sys.modules.keys()
    # All of it stays: no fork is to look for garbage in it, nor to copy what it looks at.
    gc.freeze()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _die_with_parent()
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            os._exit(_ended(functools.partial(_become, request)))
        answers.write(f"{json.dumps(_watch(child, request['timeout']))}\n")
        answers.flush()


def _watch(child: int, timeout: float) -> dict[str, Any]:
    status, timed_out = _wait(child, timeout), False
    if status is None:
        timed_out = True
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    leftover = [] if _wait(-1, _GRACE_SECONDS) is not None else _children()
    while left := _children():
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"returncode": code, "timed_out": timed_out, "leftover": leftover}


def _wait(pid: int, seconds: float) -> int | None:
    """Return the wait status of a child, 0 for ``-1`` when there is none any more; None when time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return 0
        if ended and pid > 0:
            return status
        if not ended:
            time.sleep(_LOOK_SECONDS)
    return None


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _become(request: dict[str, Any]) -> None:
    """Be what a process of its own would be, and run."""
    gc.enable()
    os.setsid()
    _die_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, descriptor in (("output.txt", 1), ("errors.txt", 2)):
        file = Path(request["out"]) / name
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    if request["nproc"]:
        os.dup2(1, 2)
    os.chdir(request["cwd"])
    # `python -m` searches where it is started first.
    mine, added = (env.get("PYTHONPATH", "").split(os.pathsep) for env in (os.environ, request["env"]))
    sys.path[:] = [request["cwd"], *filter(None, added), *(path for path in sys.path[1:] if path not in mine)]
    sys.modules.pop("tests", None)  # which another folder may have
    os.environ.clear()
    os.environ.update(request["env"])
    if request["nproc"]:
        _as_agent(request["module"], request["arguments"], request["nproc"])
    else:
        _as_main(request["module"], request["arguments"])


def _as_main(module: str, arguments: Sequence[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _as_agent(module: str, arguments: Sequence[str], nproc: int) -> None:
    from torch.distributed import run

    config_from_args = run.config_from_args
    # As `Children` has it: the agent's store looks up names under a lock, with which no rank is to be forked.
    all_forked = multiprocessing.get_context("fork").Barrier(nproc, timeout=60)

    def forking(args: Any) -> tuple[Any, Callable[..., None], list[Any]]:
        config, _, _ = config_from_args(args)
        config.start_method = "fork"
        return config, _as_rank, [module, list(arguments), all_forked]

    run.config_from_args = forking
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(nproc)]
    run.main([*options, "-m", module, *arguments])


def _as_rank(module: str, arguments: Sequence[str], all_forked: Barrier) -> None:
    _die_with_parent()
    all_forked.wait()
    # The agent's would raise here.
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(one, signal.SIG_DFL)
    # Python does so as it starts.
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if (file := Path(folder) / "sitecustomize.py").exists():
            runpy.run_path(str(file), run_name="sitecustomize")
    # A rank that ends well has to return to the agent's own code, which waits for what it returns.
    if status := _ended(functools.partial(_as_main, module, arguments)):
        os._exit(status)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _ended(run: Callable[[], None]) -> int:
    """Run, and do what Python does at its end; return the exit status."""
    status = 0
    try:
        run()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()
