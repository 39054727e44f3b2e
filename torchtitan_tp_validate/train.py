"""``torchrun ... -m torchtitan_tp_validate.train <torchtitan's own arguments>``: torchtitan.train, guarded.

Four arguments are ours, and are not passed on: ``--replicate-kv-heads``, ``--repair``, ``--allow CODE``,
``--check-replicas N``.

torchtitan parses its own command line; the job is checked before any device or process group is
touched; a compatible one is handed over to ``torchtitan.train`` untouched, guards in place.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
from datetime import timedelta
from typing import Any

from torchtitan_tp_validate.cli.formats import block
from torchtitan_tp_validate.errors import (
    KVReplicationError,
    RunError,
    TPDegreeError,
    UnknownNameError,
    UsageError,
)
from torchtitan_tp_validate.guards import hand_over, install, recorded_check
from torchtitan_tp_validate.job import parse_command_line
from torchtitan_tp_validate.supported import missing_import, unsupported_torchtitan

_FLAGS = {"--replicate-kv-heads": "replicate_kv_heads", "--repair": "repair"}
_ALLOW = "--allow"
_CHECK_REPLICAS = "--check-replicas"
_PATIENCE = timedelta(seconds=60)
_NO_TORCHTITAN = 2


def main() -> None:
    """Check the job on the command line, then run ``torchtitan.train`` with it.

    Exits with status 1 on refusal: the full message on rank 0, its first line on the others. With status 2
    where the installed torchtitan is none that is supported, or lacks a package that it imports.
    """
    stop_without_torchtitan()
    try:
        install(**_take_flags())
        config = parse_command_line()
        recorded_check(config)
    except (RunError, TPDegreeError, KVReplicationError, UnknownNameError, UsageError) as error:
        _say(str(error))
        _wait_for_all_ranks()
        raise SystemExit(1) from None
    _parse_no_more(config)
    hand_over(config)
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)


def stop_without_torchtitan() -> None:
    """Exit with status 2 and the reason where there is no torchtitan whose job could be judged."""
    problem = unsupported_torchtitan()
    if problem is None:
        try:
            importlib.import_module("torchtitan.config")
            return
        except ImportError as error:
            problem = missing_import(error)
    _say(problem)
    _wait_for_all_ranks()
    raise SystemExit(_NO_TORCHTITAN)


def _say(message: str) -> None:
    """Print all of a message on rank 0, and its first line on the others."""
    rank = int(os.environ.get("RANK", "0"))
    text = message if rank == 0 else f"[rank {rank}] {message.splitlines()[0]}"
    # In one write: ranks share the stream, and print() would write the end of the line by itself.
    sys.stderr.write(f"{block(text)}\n")
    sys.stderr.flush()


def _take_flags() -> dict[str, Any]:
    """Return what our flags ask of `install`; torchtitan, which does not know them, will not see them.

    Raises:
        UsageError: ``--allow`` names no rule, or ``--check-replicas`` no number of steps.
    """
    taken: dict[str, Any] = {option: flag in sys.argv[1:] for flag, option in _FLAGS.items()}
    left, allowed, steps = [], [], 0
    words = iter([word for word in sys.argv[1:] if word not in _FLAGS])
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in (_ALLOW, _CHECK_REPLICAS):
            left.append(word)
            continue
        codes = value if equals else next(words, "")
        if flag == _CHECK_REPLICAS:
            if not codes.isdecimal() or not int(codes):
                raise UsageError(f"{_CHECK_REPLICAS} wants a number of steps: {_CHECK_REPLICAS} 100.")
            steps = int(codes)
            continue
        if not codes or codes.startswith("-"):
            raise UsageError(f"{_ALLOW} wants the code of a rule: {_ALLOW} NUM001, or {_ALLOW} NUM001,PP005.")
        allowed += codes.upper().split(",")
    sys.argv[1:] = left
    return {**taken, "allow": allowed, "check_replicas": steps}


def _parse_no_more(config: Any) -> None:
    """Have torchtitan.train, which parses its command line, get the job that was judged, and converted."""
    from torchtitan.config import ConfigManager

    parse_args = ConfigManager.parse_args

    @functools.wraps(parse_args)
    def parsed(self: Any, *args: Any, **kwargs: Any) -> Any:
        ConfigManager.parse_args = parse_args
        self.config = config
        return config

    ConfigManager.parse_args = parsed


def _wait_for_all_ranks() -> None:
    """Let every rank of this torchrun speak before one exits, since torchrun then stops the others.

    Uses the store that torchrun itself runs; no process group is created. Without torchrun there is
    nobody to wait for.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore

    attempt = f"torchtitan_tp_validate/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_PATIENCE,
        )
        if store.add(f"{attempt}/spoken", 1) == int(os.environ["WORLD_SIZE"]):
            store.set(f"{attempt}/all", b"")
        store.wait([f"{attempt}/all"])
    except RuntimeError as error:
        sys.stderr.write(f"Not every rank has spoken yet, but this one stops now: {error}\n")


if __name__ == "__main__":
    main()
