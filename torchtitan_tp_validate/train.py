"""``torchrun ... -m torchtitan_tp_validate.train <torchtitan's own arguments>``: torchtitan.train, guarded.

One argument is ours, and is not passed on: ``--replicate-kv-heads``.

torchtitan parses its own command line; the job is checked before any device or process group is
touched; a compatible one is handed over to ``torchtitan.train`` untouched, guards in place.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torchtitan_tp_validate.errors import KVReplicationError, TPCompatError
from torchtitan_tp_validate.install import install, recorded_check

REPLICATE_FLAG = "--replicate-kv-heads"
_PATIENCE = timedelta(seconds=60)


def main() -> None:
    """Check the job on the command line, then run ``torchtitan.train`` with it.

    Exits with status 1 on refusal: the full message on rank 0, its first line on the others.
    """
    install(replicate_kv_heads=_take_flag())
    try:
        recorded_check(parse_command_line())
    except (TPCompatError, KVReplicationError) as error:
        rank = int(os.environ.get("RANK", "0"))
        print(
            error if rank == 0 else f"[rank {rank}] {str(error).splitlines()[0]}", file=sys.stderr, flush=True
        )
        _wait_for_all_ranks()
        raise SystemExit(1) from None
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)


def _take_flag() -> bool:
    """Whether the command line has our flag; torchtitan, which does not know it, will not see it."""
    asked = REPLICATE_FLAG in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != REPLICATE_FLAG]
    return asked


def parse_command_line(arguments: Sequence[str] | None = None) -> Any:
    """The job that torchtitan makes of these arguments, or of this process's."""
    from torchtitan.config import ConfigManager

    # Explicit, since 0.2.x binds its default when it is imported.
    return ConfigManager().parse_args(list(sys.argv[1:] if arguments is None else arguments))


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
        print(f"Not every rank has spoken yet, but this one stops now: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
