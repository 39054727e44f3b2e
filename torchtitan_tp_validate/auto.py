"""Importing this module installs the guards.

For torchtitan 0.2.x: ``torchrun ... -m torchtitan.train --experimental.custom_import
torchtitan_tp_validate.auto ...``. The Trainer imports it first thing, before its device and process
groups, but is then already running, so the job is checked right here.
"""

import sys

from torchtitan_tp_validate.guards import install, recorded_check
from torchtitan_tp_validate.job import parse_command_line
from torchtitan_tp_validate.train import stop_without_torchtitan

stop_without_torchtitan()
install()

_main = sys.modules["__main__"]
_runs_torchtitan = _main.__spec__ is not None and _main.__spec__.name == "torchtitan.train"
# 0.3.x defines its Trainer in an importable module, where the guard of its start catches it.
if _runs_torchtitan and getattr(getattr(_main, "Trainer", None), "__module__", None) == "__main__":
    recorded_check(parse_command_line())
