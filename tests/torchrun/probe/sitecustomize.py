"""Imported by every Python that has this folder on its path: shows where a torchtitan job gets to.

It lets the job use the CPU as its device, and ends it with a mark in ``$TP_VALIDATE_PROBE`` when it is
about to create its first process group.
"""

import os
import sys
import time
from pathlib import Path

from wrapt import register_post_import_hook

REACHED = 17
"""Exit status of a job that got as far as its first process group."""


def _use_cpu(utils):
    import torch

    utils.device_type, utils.device_module = "cpu", torch.cpu


def _stop_at_process_group(c10d):
    def init_process_group(*args, **kwargs):
        rank = os.environ["RANK"]
        folder = Path(os.environ["TP_VALIDATE_PROBE"])
        (folder / f"process-group-{rank}").touch()
        # torchrun stops the other ranks as soon as one ends.
        deadline = time.monotonic() + 60
        while len(list(folder.glob("process-group-*"))) < int(os.environ["WORLD_SIZE"]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        os._exit(REACHED)

    c10d.init_process_group = init_process_group
    # Where it has been imported from c10d already.
    sys.modules["torch.distributed"].init_process_group = init_process_group


if "TP_VALIDATE_PROBE" in os.environ and "RANK" in os.environ:
    register_post_import_hook(_use_cpu, "torchtitan.tools.utils")
    register_post_import_hook(_stop_at_process_group, "torch.distributed.distributed_c10d")
