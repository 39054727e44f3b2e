"""What the check at load costs, as a part of loading a tiny model by native tensor parallelism.

    python scripts/hf_load_cost.py

One process that believes to be one of two ranks (torch's fake process group), so that nothing but the work
of transformers itself is measured against the check. With TP off the guarded function is not called at all.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.transformers_tp import guard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.transformers.models import save, tp_arguments

LOADS = 30


def main() -> None:
    """Load each family with the guard in place, and take the time of the check inside."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    checks: list[float] = []
    original = guard.check

    def timed(*args: Any) -> None:
        started = time.perf_counter()
        original(*args)
        checks.append(time.perf_counter() - started)

    print(f"transformers {transformers.__version__}, median of {LOADS} loads")
    for family in ("llama", "qwen3_5_moe"):
        with (
            tempfile.TemporaryDirectory() as folder,
            tpv.installed(),
            mock.patch.object(guard, "check", timed),
        ):
            cls = save(Path(folder), family)
            on = loads(cls, folder, **tp_arguments(2))
            check = statistics.median(checks)
            checks.clear()
            off = loads(cls, folder)
            print(
                f"{family}: the check {check * 1e3:.2f} ms of {on * 1e3:.1f} ms = {check / on:.2%}; "
                f"TP off: {len(checks)} checks in {LOADS} loads of {off * 1e3:.1f} ms"
            )
    dist.destroy_process_group()


def loads(cls: Any, folder: str, **arguments: Any) -> float:
    """The median time of loading, in seconds."""
    times = []
    for _ in range(LOADS):
        started = time.perf_counter()
        cls.from_pretrained(folder, **arguments)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
