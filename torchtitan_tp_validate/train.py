"""``torchrun ... -m torchtitan_tp_validate.train <torchtitan's own arguments>``: torchtitan.train, guarded.

One argument is ours, and is not passed on: ``--replicate-kv-heads``.

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
from torchtitan_tp_validate.errors import KVReplicationError, RunError, TPDegreeError
from torchtitan_tp_validate.guards import hand_over, install, recorded_check
from torchtitan_tp_validate.job import parse_command_line
from torchtitan_tp_validate.supported import missing_import, unsupported_torchtitan

REPLICATE_FLAG = "--replicate-kv-heads"
_PATIENCE = timedelta(seconds=60)
_NO_TORCHTITAN = 2


def main() -> None:
    """Check the job on the command line, then run ``torchtitan.train`` with it.

    Exits with status 1 on refusal: the full message on rank 0, its first line on the others. With status 2
    where the installed torchtitan is none that is supported, or lacks a package that it imports.
    """
    stop_without_torchtitan()
    install(replicate_kv_heads=_take_flag())
    try:
        config = parse_command_line()
        recorded_check(config)
    except (RunError, TPDegreeError, KVReplicationError) as error:
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


def _take_flag() -> bool:
    """Whether the command line has our flag; torchtitan, which does not know it, will not see it."""
    asked = REPLICATE_FLAG in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != REPLICATE_FLAG]
    return asked


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
