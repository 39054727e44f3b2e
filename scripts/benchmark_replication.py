#!/usr/bin/env python
"""What KV-head replication costs: step time, peak memory and communicated bytes, side by side in one run.

    torchrun --standalone --nproc-per-node 4 scripts/benchmark_replication.py
    torchrun --standalone --nproc-per-node 8 scripts/benchmark_replication.py --flavor 397B-A17B
    scripts/benchmark_replication.py --flavor 397B-A17B --one-of 16

On torchtitan 0.3.x, models of the same sizes but for n_kv_heads are trained by turns on the same tokens: two
key-value heads at TP = the number of ranks, replicated, beside (a) as many as ranks at that TP and (b) two at
TP 2 (x FSDP). Every rank takes part in all of them. On GPUs (one per rank) the model is larger and times are
those of CUDA events. With a flavor it is one layer as wide as those of that Qwen3.5, its feed-forward as wide
as the experts that a token meets, and (b), which needs most memory, is left out. ``--one-of N`` is one of so
many ranks alone, its exchanges counted but not made: bytes and memory, and of the time what it computes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line, sum_gradients_without_nccl
from torchtitan_tp_validate.rehearsal.parallelize import Guards, build, make_parallel_dims, parallelize
from torchtitan_tp_validate.rehearsal.training import join_process_group

MEBIBYTE = 2**20
M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


@dataclass(frozen=True)
class Sizes:
    """The proportions of the model."""

    dim: int
    hidden: int
    vocab: int
    seq_len: int
    n_heads: int
    head_dim: int = 128
    layers: int = 2


CPU = Sizes(dim=2048, hidden=6144, vocab=8192, seq_len=512, n_heads=16)
GPU = Sizes(dim=4096, hidden=12288, vocab=32768, seq_len=8192, n_heads=32)


@dataclass
class Variant:
    """One of the models, and what was measured of it."""

    name: str
    step: Callable[[], None]
    persistent_bytes: int
    seconds: list[float] = field(default_factory=list)
    transient_bytes: list[int] = field(default_factory=list)
    communicated_bytes: int = 0

    def memory(self) -> float:
        """Peak memory of a rank in MiB: what stays, and what a step adds at most."""
        return (self.persistent_bytes + statistics.median(self.transient_bytes)) / MEBIBYTE


class CommunicatedBytes(TorchDispatchMode):  # type: ignore[misc]
    """Counts what this rank takes part in exchanging: the larger side of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and add the size of its tensors if it is a collective."""
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            sizes = [t.numel() * t.element_size() for t in _tensors((args, result))]
            self.total += max(sizes, default=0)
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def main() -> None:
    """Measure the three by turns, and print on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flavor", help="of torchtitan's Qwen3.5 with experts")
    parser.add_argument("--one-of", type=int, metavar="N", help="run one rank of so many, without torchrun")
    options = parser.parse_args()
    line = installed_line()
    device = _pose_as_a_rank(line, options.one_of) if options.one_of else join_process_group(line)
    if device.type == "cpu":
        # Every freed tensor goes back to the system at once, or the resident set would say little.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    sizes = GPU if device.type == "cuda" else CPU
    if options.flavor:
        sizes = _of_a_layer(options.flavor, sizes)
    guards, ranks = Guards(), dist.get_world_size()
    variants = [
        _variant(f"n_kv_heads 2 at TP {ranks}, replicated", 2, ranks, True, sizes, line, device, guards),
        _variant(f"(a) n_kv_heads {ranks} at TP {ranks}", ranks, ranks, False, sizes, line, device, guards),
    ]
    if not options.flavor:
        name = f"(b) n_kv_heads 2 at TP 2 x FSDP {ranks // 2}"
        variants.append(_variant(name, 2, 2, False, sizes, line, device, guards))
    for variant in variants:
        variant.step()
        with CommunicatedBytes() as counter:
            variant.step()
        variant.communicated_bytes = counter.total
    for turn in range(options.rounds):
        # Each begins in its turn.
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            _measure(variant, device)
    if dist.get_rank() == 0:
        _print(variants, sizes, device)
    dist.destroy_process_group()


def _pose_as_a_rank(line: Any, ranks: int) -> torch.device:
    """Set this process up as the first of so many ranks, on the CPU, of which the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    line.prepare("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return torch.device("cpu")


def _of_a_layer(flavor: str, sizes: Sizes) -> Sizes:
    """Return the sizes of one layer of a flavor of Qwen3.5 with experts."""
    from torchtitan.models.qwen3_5 import model_registry

    model: Any = model_registry(flavor).model
    attention = next(layer.attention for layer in model.layers if layer.attention is not None)
    experts = model.layers[0].moe
    hidden = (experts.router.top_k + 1) * experts.shared_experts.w1.out_features
    heads = {"n_heads": attention.n_heads, "head_dim": attention.head_dim}
    return replace(sizes, dim=model.dim, hidden=hidden, vocab=1024, layers=1, **heads)


def _variant(
    name: str,
    n_kv_heads: int,
    tp: int,
    replicate: bool,
    sizes: Sizes,
    line: Any,
    device: torch.device,
    guards: Guards,
) -> Variant:
    given = {"dim": sizes.dim, "hidden": sizes.hidden, "vocab": sizes.vocab, "seq_len": sizes.seq_len}
    how: dict[str, Any] = {"guard": "install", "replicate_kv_heads": replicate, "as_trainer": True}
    text = f"llama3:{sizes.n_heads}/{n_kv_heads}:tp={tp},head_dim={sizes.head_dim}"
    case = Case.parse(text, dist.get_world_size(), sizes=given, upstream_check=True, **how)
    guards.before_build(case)
    tiny = build(line, case)
    for index in list(tiny.model.layers)[sizes.layers :]:
        del tiny.model.layers[index]
    model, context, _ = parallelize(tiny, make_parallel_dims(tiny, case), case, device)
    model.to_empty(device=device)
    model.init_states(buffer_device=None)
    if device.type == "cpu":
        sum_gradients_without_nccl(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    # The same number of tokens in all: the ranks that TP leaves have other ones.
    shape = (2 * tp // dist.get_world_size(), sizes.seq_len + 1)
    text = torch.randint(sizes.vocab, shape, generator=torch.Generator().manual_seed(0)).to(device)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> None:
        with context():
            tiny.loss(model, tokens, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    parameters = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    # The weights and AdamW's two moments.
    return Variant(name, step, 3 * sum(p.numel() * p.element_size() for p in parameters))


def _measure(variant: Variant, device: torch.device) -> None:
    dist.barrier()
    with _peak_memory(device, variant.transient_bytes):
        start = time.perf_counter()
        variant.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        variant.seconds.append(time.perf_counter() - start)


@contextmanager
def _peak_memory(device: torch.device, found: list[int]) -> Iterator[None]:
    """Append what the block needs at most beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    # Linux: resets the peak of the resident set.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    yield
    found.append(_resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _print(variants: list[Variant], sizes: Sizes, device: torch.device) -> None:
    tokens = 2 * sizes.seq_len
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(
        f"torch {torch.__version__}, {dist.get_world_size()} ranks on {where}, {dist.get_backend()}, "
        f"{tokens} tokens a step, fp32, {sizes}"
    )
    ours = variants[0]
    for variant in variants:
        print(
            f"{variant.name:35} {statistics.median(variant.seconds):8.3f} s  {variant.memory():8.1f} MiB  "
            f"{variant.communicated_bytes / MEBIBYTE:8.1f} MiB exchanged"
        )
    for other in variants[1:]:
        ratios = [a / b for a, b in zip(ours.seconds, other.seconds, strict=True)]
        print(
            f"replicated over {other.name[:3]}: step time {statistics.median(ratios):.3f} "
            f"(median of {len(ratios)} rounds), "
            f"memory {ours.memory() / other.memory():.3f}, "
            f"bytes {ours.communicated_bytes / other.communicated_bytes:.3f}"
        )


if __name__ == "__main__":
    main()
