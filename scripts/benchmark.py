#!/usr/bin/env python
"""What the check costs, and what it saves, as ratios measured side by side.

    scripts/benchmark.py cost                   the check against the parallelize call behind it
    scripts/benchmark.py refusal PYTHON ...     from torchrun's start to the refusal, ours against stock

``cost`` runs on the installed torchtitan, on meta, in one process that poses as a world of 8 ranks.
``refusal`` takes the interpreters of one or more environments (after ``scripts/test`` they are under
``.nox/*/bin/python``) and starts 4 ranks in each, on the CPU. Stock torchtitan cannot start its Trainer
there, so its side builds, parallelizes and runs a tiny model by the same calls: what it takes to fail is
a lower bound of what a real model takes.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
TP_COST = 8


def main() -> None:
    """Parse the command line and run what it names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    cost = commands.add_parser("cost")
    cost.set_defaults(run=lambda options: measure_cost())
    refusal = commands.add_parser("refusal")
    refusal.add_argument("pythons", nargs="+", type=Path)
    refusal.add_argument("--repeats", type=int, default=3)
    refusal.set_defaults(run=lambda options: measure_refusal(options.pythons, options.repeats))
    stock = commands.add_parser("stock")
    stock.set_defaults(run=lambda options: run_stock())
    options = parser.parse_args()
    options.run(options)


def measure_cost() -> None:
    """Print the cost of the check for llama3 405B, beside parallelize, and how it grows with layers."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from torchtitan_tp_validate import validate_tp_compat

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=TP_COST)
    build = _llama_0_2 if version("torchtitan").startswith("0.2") else _llama_0_3
    layers, parallel_dims, models, parallelize = build()

    print(f"torchtitan {version('torchtitan')}, llama3 405B on meta, TP {TP_COST}")
    for n_layers, model in zip(layers, models, strict=True):
        check_model = functools.partial(validate_tp_compat, model, parallel_dims)
        seconds = statistics.median(_timed(check_model, 101))
        print(f"  validate_tp_compat, {n_layers:4} layers: {seconds * 1e3:7.3f} ms")
        if n_layers == layers[0]:
            check = seconds
    (whole,) = _timed(parallelize, 1)
    print(f"  parallelize_llama,  {layers[0]:4} layers: {whole * 1e3:7.0f} ms")
    print(f"  the check is 1/{whole / check:.0f} of the call that it guards")


def _llama_0_2() -> tuple[list[int], Any, list[Any], Callable[[], Any]]:
    import dataclasses

    import torch
    from torchtitan.config import JobConfig
    from torchtitan.protocols.train_spec import get_train_spec

    parallel_dims = _parallel_dims(etp=1)
    spec = get_train_spec("llama3")
    args = spec.model_args["405B"]
    layers = [args.n_layers * factor for factor in (1, 2, 4)]
    with torch.device("meta"):
        models = [spec.model_cls(dataclasses.replace(args, n_layers=n)) for n in layers]
    job = JobConfig()
    job.parallelism.tensor_parallel_degree = TP_COST
    return layers, parallel_dims, models, lambda: spec.parallelize_fn(models[0], parallel_dims, job)


def _llama_0_3() -> tuple[list[int], Any, list[Any], Callable[[], Any]]:
    import torch
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.llama3 import model_registry

    parallel_dims = _parallel_dims()
    parallelism = ParallelismConfig(tensor_parallel_degree=TP_COST)
    set_spmd_backend(parallelism.spmd_backend)
    spec = model_registry("405B")
    spec.model.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    n_layers = len(spec.model.layers)
    with torch.device("meta"):
        model = spec.model.build()
    # What the check reads is the config: deeper models need not be built.
    deeper = [SimpleNamespace(config=SimpleNamespace(layers=spec.model.layers * factor)) for factor in (2, 4)]

    def parallelize() -> Any:
        return spec.parallelize_fn(
            model,
            parallel_dims=parallel_dims,
            training=TrainingConfig(),
            parallelism=parallelism,
            compile_config=CompileConfig(),
            ac_config=None,
            dump_folder=tempfile.gettempdir(),
        )

    return [n_layers, 2 * n_layers, 4 * n_layers], parallel_dims, [model, *deeper], parallelize


def _parallel_dims(**more: int) -> Any:
    from torchtitan.distributed import parallel_dims
    from torchtitan.tools import utils

    utils.device_type = parallel_dims.device_type = "cpu"
    return parallel_dims.ParallelDims(
        dp_replicate=1, dp_shard=1, cp=1, tp=TP_COST, pp=1, ep=1, world_size=TP_COST, **more
    )


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_refusal(pythons: Sequence[Path], repeats: int) -> None:
    """Print the seconds from torchrun's start to its end, ours and stock by turns."""
    for python in pythons:
        release = _output(
            [str(python), "-c", "from importlib.metadata import version as v; print(v('torchtitan'))"]
        )
        ours, stock = [], []
        with tempfile.TemporaryDirectory() as folder:
            commands = _commands_0_2 if release.startswith("0.2") else _commands_0_3
            our_command, stock_command = commands(Path(folder))
            for _ in range(repeats):
                ours.append(_torchrun(python, our_command, "must divide n_kv_heads"))
                stock.append(
                    _torchrun(python, stock_command, "invalid for input of size|must divide n_kv_heads")
                )
        a, b = statistics.median(ours), statistics.median(stock)
        print(
            f"torchtitan {release}, {RANKS} ranks, median of {repeats}: refused after {a:.1f} s, "
            f"stock fails after {b:.1f} s: ratio {b / a:.2f}"
        )


def _commands_0_2(folder: Path) -> tuple[list[str], list[str]]:
    job = folder / "job.toml"
    job.write_text('[model]\nname = "llama3"\nflavor = "8B"\n[parallelism]\ntensor_parallel_degree = 16\n')
    return (
        ["-m", "torchtitan_tp_validate.train", "--job.config_file", str(job)],
        [__file__, "stock"],
    )


def _commands_0_3(_: Path) -> tuple[list[str], list[str]]:
    flag = "--parallelism.tensor_parallel_degree"
    return (
        ["-m", "torchtitan_tp_validate.train", "--module", "llama3", "--config", "llama3_8b", flag, "16"],
        [__file__, "stock"],
    )


def run_stock() -> None:
    """Run a rank of stock torchtitan, with two KV heads on four ranks, as far as it gets."""
    from torchtitan_tp_validate.rehearsal.cases import Case
    from torchtitan_tp_validate.rehearsal.models import installed_line
    from torchtitan_tp_validate.rehearsal.parallelize import build, make_parallel_dims, parallelize
    from torchtitan_tp_validate.rehearsal.training import join_process_group, train

    line = installed_line()
    device = join_process_group(line)
    case = Case("llama3", tp=RANKS, n_heads=8, n_kv_heads=2, upstream_check=True)
    tiny = build(line, case)
    model, *_ = parallelize(tiny, make_parallel_dims(tiny, case), case, device)
    tiny.initialize(model, device)
    next(train(tiny, model, device, steps=1, seed=case.seed, enter=lambda stage: None))


def _torchrun(python: Path, program: Sequence[str], expected: str) -> float:
    command = [str(python), "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(RANKS), *program]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode == 0 or not any(text in result.stderr for text in expected.split("|")):
        sys.exit(
            f"{' '.join(command)}\nwas expected to fail with {expected!r}:\n{result.stdout}{result.stderr}"
        )
    return seconds


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
