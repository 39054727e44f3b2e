#!/usr/bin/env python
"""What the command line costs, as ratios measured side by side.

    scripts/benchmark_cli.py hf           check --hf-config beside `python -c pass`, and 1,000 of them at once
    scripts/benchmark_cli.py torchtitan   check --model beside the bare import of what it needs, and beside
                                          what a user would do otherwise

Whole processes, by turns, in this interpreter and its environment. Bytecode goes to a temporary folder and
is there before the first measurement, as it is after an installation.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = 1000

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}

# What has to be imported to know llama3 405B and what it shards, whatever is done with it. (In 0.3.x its
# config imports the trainer before it declares its shardings.)
IMPORTS = {
    "0.2": "import torchtitan.config, torchtitan.models.llama3, torchtitan.experiments",
    "0.3": "import torchtitan.config, torchtitan.models.llama3, torchtitan.trainer",
}

# Build the model on meta and run torchtitan's own parallelize function in a world of 16 that one process
# poses as: torchtitan's own check on 0.3.x refuses before that, and 0.2.x has none, so it dies in forward.
OTHERWISE = {
    "0.2": """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import parallel_dims
from torchtitan.tools import utils
utils.device_type = parallel_dims.device_type = "cpu"
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
spec = get_train_spec("llama3")
with torch.device("meta"):
    model = spec.model_cls(spec.model_args["405B"])
job = JobConfig()
job.parallelism.tensor_parallel_degree = 16
dims = parallel_dims.ParallelDims(
    dp_replicate=1, dp_shard=1, cp=1, tp=16, pp=1, ep=1, etp=1, world_size=16)
spec.parallelize_fn(model, dims, job)
with torch.no_grad():
    model(torch.zeros(1, 16, dtype=torch.long, device="meta"))
""",
    "0.3": """
import torch
from types import SimpleNamespace
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.llama3 import model_registry
spec = model_registry("405B")
parallelism = ParallelismConfig(tensor_parallel_degree=16)
with torch.device("meta"):
    spec.model.build()
spec.model.update_from_config(config=SimpleNamespace(parallelism=parallelism, training=TrainingConfig()))
""",
}


def main() -> None:
    """Parse the command line and run what it names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["hf", "torchtitan"])
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure = measure_hf if options.what == "hf" else measure_torchtitan
        measure(Path(folder), options.repeats)


def measure_hf(folder: Path, repeats: int | None) -> None:
    """Print the start-up ratio, and what a thousand configs cost over it."""
    repeats = repeats or 20
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIG))
    many = [folder / f"{number}.json" for number in range(CONFIGS)]
    for copy in many:
        copy.write_text(file.read_text())
    check = ["-m", "torchtitan_tp_validate", "check", "--tp", "8", "--hf-config"]
    commands = {
        "python -c pass": ["-c", "pass"],
        "argparse, json, dataclasses alone": ["-c", "import argparse, json, dataclasses"],
        "check --hf-config": [*check, str(file)],
        f"the same, {CONFIGS} configs in one call": [*check, *map(str, many)],
    }
    medians = _medians(commands, folder, repeats)
    base, _, one, thousand = medians.values()
    _show(medians, base, repeats)
    cpu = _cpu_seconds([*check, *map(str, many)], folder) - _cpu_seconds([*check, str(file)], folder)
    print(f"{CONFIGS} configs over one: {thousand - one:.2f} s, of which {cpu:.2f} s on the processor")


def measure_torchtitan(folder: Path, repeats: int | None) -> None:
    """Print a torchtitan check beside the imports that it needs, and beside torchtitan's own path."""
    repeats = repeats or 5
    line = version("torchtitan")[:3]
    commands = {
        "import of the torchtitan modules": ["-c", IMPORTS[line]],
        "check --model llama3 --flavor 405B --tp 16": [
            *("-m", "torchtitan_tp_validate", "check", "--model", "llama3", "--flavor", "405B", "--tp", "16")
        ],
        "build on meta and torchtitan's own path": ["-c", OTHERWISE[line]],
    }
    medians = _medians(commands, folder, repeats, fails={1, 2})
    base = next(iter(medians.values()))
    print(f"torchtitan {version('torchtitan')}")
    _show(medians, base, repeats)


def _medians(
    commands: dict[str, list[str]], folder: Path, repeats: int, fails: Sequence[int] | set[int] = ()
) -> dict[str, float]:
    """Seconds of each command, measured by turns; those of ``fails`` refuse, and must."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for position, (name, arguments) in enumerate(commands.items()):
            took = _seconds(arguments, folder, expects_failure=position in fails)
            if turn:  # the first one writes the bytecode
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(arguments: Sequence[str], folder: Path, *, expects_failure: bool) -> float:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if (result.returncode != 0) is not expects_failure:
        sys.exit(f"{arguments} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return seconds


def _cpu_seconds(arguments: Sequence[str], folder: Path) -> float:
    """What a process asks of the processor, which a busy machine does not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _seconds(arguments, folder, expects_failure=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _show(medians: dict[str, float], base: float, repeats: int) -> None:
    for name, seconds in medians.items():
        print(f"{seconds * 1e3:8.1f} ms  {seconds / base:5.2f}x  {name}")
    print(f"(median of {repeats}, by turns)")


if __name__ == "__main__":
    main()
