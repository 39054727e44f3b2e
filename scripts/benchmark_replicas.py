#!/usr/bin/env python
"""What ``--check-replicas 100`` costs: one comparison of all copies beside a training step, in one run.

    torchrun --standalone --nproc-per-node 4 scripts/benchmark_replicas.py

HSDP has a copy of every weight on each replica, the most that there is to compare: llama3 at TP 2 and
``data_parallel_replicate_degree`` 2, on torchtitan 0.3.x.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line, sum_gradients_without_nccl
from torchtitan_tp_validate.rehearsal.parallelize import build, make_parallel_dims, parallelize
from torchtitan_tp_validate.rehearsal.training import join_process_group
from torchtitan_tp_validate.repairs.replicas import check_replicas

EVERY = 100
SIZES = {"dim": 2048, "hidden": 6144, "vocab": 8192, "seq_len": 512}


def main() -> None:
    """Measure both by turns, and print on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    line = installed_line()
    device = join_process_group(line)
    case = Case("llama3", tp=2, dp_replicate=2, n_heads=16, n_kv_heads=4, head_dim=128, sizes=SIZES)
    tiny = build(line, case)
    model, context, _ = parallelize(tiny, make_parallel_dims(tiny, case), case, device)
    torch.manual_seed(0)
    tiny.initialize(model, device)
    if device.type == "cpu":
        sum_gradients_without_nccl(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    text = torch.randint(tiny.vocab_size, (1, tiny.seq_len + 1)).to(device)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> None:
        with context():
            tiny.loss(model, tokens, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def compare() -> None:
        check_replicas(model, 1)

    step()
    compare()
    steps, comparisons = [], []
    for _ in range(options.rounds):
        steps.append(_seconds(step, device))
        comparisons.append(_seconds(compare, device))
    if dist.get_rank() == 0:
        ratio = statistics.median(a / b for a, b in zip(comparisons, steps, strict=True))
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores, gloo"
        print(f"torch {torch.__version__}, 4 ranks on {where}, {tiny.seq_len} tokens a step, {SIZES}")
        print(
            f"step {statistics.median(steps):.3f} s, comparison {statistics.median(comparisons):.3f} s: "
            f"{ratio / EVERY:.2%} of the steps at one in {EVERY} (median of {options.rounds} rounds)"
        )
    dist.destroy_process_group()


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
