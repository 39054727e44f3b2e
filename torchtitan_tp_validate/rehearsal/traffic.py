"""What a rank sends in a step, counted at torch's own collectives.

The step may be that of a job's own Trainer whose tensors have shapes and no memory: then a model of any size
goes through it on a CPU, activation checkpointing included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import distributed_c10d
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.peak import PeakMemory

Groups = Counter[tuple[str, tuple[int, ...]]]
"""(Kind of collective, ranks that take part) -> bytes."""

ALL_TO_ALL = "all to all"
SEND = "send"

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_KINDS = {
    "all gather": ("_allgather_base_", "allgather_", "all_gather_into_tensor"),
    "reduce scatter": ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor"),
    "all reduce": ("allreduce_", "all_reduce", "all_reduce_"),
    ALL_TO_ALL: ("alltoall_base_", "alltoall_", "all_to_all_single", "shard_dim_alltoall"),
    "send": (SEND, "broadcast", "broadcast_"),
    "": (
        "recv_",
        "recv_any_source_",
        "barrier",
        "monitored_barrier_",
        "wait_tensor",
        "wait_tensors",
        "_wrap_tensor_autograd",
    ),
}
_DEVICE = torch.device("cpu")
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}


def bytes_sent(kind: str, given: int, ranks: int) -> int:
    """Return what a rank sends in a collective where none sends more than it has to: in a ring, or in pairs.

    Args:
        kind: of the collective.
        given: the bytes that the rank puts in.
        ranks: how many take part.
    """
    if kind == "all gather":
        return given * (ranks - 1)
    if kind == "send":
        return given if ranks > 1 else 0
    return (2 if kind == "all reduce" else 1) * given * (ranks - 1) // ranks


class SentBytes(TorchDispatchMode):  # type: ignore[misc]
    """Counts what this rank sends while it is entered.

    Attributes:
        groups: the bytes, by what they are sent in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: Groups = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it where it is a collective."""
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # The operations that it is made of come by.
        if func.namespace in _NAMESPACES:
            self._count(func, args)
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation."""
        return func(*args, **kwargs)

    def _count(self, func: Any, args: Any) -> None:
        name = func._schema.name.partition("::")[2]
        kind = _KIND.get(name)
        if kind is None:
            raise RehearsalError(f"a step calls {func}, and nobody knows what that sends")
        if kind:
            named = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)}
            group = _group(named)
            ranks = tuple(distributed_c10d.get_process_group_ranks(group))
            if name == SEND:
                ranks = tuple(sorted((ranks[group.rank()], ranks[named["dst"]])))
            given = next(value for key, value in named.items() if key.startswith(("input", "tensors")))
            size = sum(one.numel() * one.element_size() for one in tree_leaves(given))
            self.groups[kind, ranks] += bytes_sent(kind, size, len(ranks))


def _group(arguments: dict[str, Any]) -> Any:
    """Return the process group of a collective."""
    if "process_group" in arguments:
        return torch.distributed.ProcessGroup.unbox(arguments["process_group"])
    group = arguments["group_name"]
    return distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group


class WithoutMemory:
    """Lets torchtitan's Trainer run steps on tensors that have shapes and no memory.

    What depends on what is in a tensor is made up: a document to each sequence, one for every number.
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def patch(self) -> None:
        """Have torch give the memory that a model of this process wants in this way."""
        to_empty, mode = torch.nn.Module.to_empty, self._mode

        def to_nothing(module: Any, **_: Any) -> Any:
            with mode:
                to_empty(module, device=_DEVICE)
            module.init_weights = module.init_states = lambda **_: None
            return module

        torch.nn.Module.to_empty = to_nothing
        # Shapes know no index of a device.
        PipelineStage.device = property(lambda _: _DEVICE, lambda *_: None)

    def batches(self, seq_len: int, batch_size: int, more: Any) -> Iterator[Any]:
        """Yield batches without an end."""
        while True:
            tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
            positions = torch.arange(seq_len).repeat(batch_size, 1)
            yield {"input": tokens, "positions": positions, **dict(more)}, tokens.clone()

    def step(self, trainer: Any) -> tuple[Groups, int]:
        """Have a Trainer do a step; return what it sends, and the bytes that it makes at its peak."""
        trainer.device = _DEVICE
        counter = _MadeUp()
        with self._mode, PeakMemory() as memory, counter:
            take_step(trainer)
        return counter.groups, memory.peak


def take_step(trainer: Any) -> None:
    """Have a Trainer do a step that it does not log, as most are."""
    trainer.metrics_processor.should_log = lambda *_: False
    trainer.step += 1
    trainer.train_step(trainer.batch_generator(trainer.dataloader))


class _MadeUp(SentBytes):
    """The same, where there are shapes only."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, or make up what it would have read."""
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(1, args[0].dim(), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return super().run(func, args, kwargs)


@contextmanager
def sharing(total: int) -> Iterator[None]:
    """Have numbers of which only the sum is known be equal shares of it, when they are read."""

    def shares(counts: torch.Tensor) -> list[int]:
        each, rest = divmod(total, len(counts))
        return [each + (index < rest) for index in range(len(counts))]

    with mock.patch.object(FakeTensor, "tolist", shares):
        yield


def by_axes(groups: Groups, degrees: dict[str, int]) -> list[dict[str, Any]]:
    """Return what is sent in each group of ranks, and the axes in which these differ.

    Args:
        groups: what is sent.
        degrees: axis -> degree, from the outermost in the order of ranks to the innermost.
    """
    sent: Counter[tuple[tuple[str, ...], tuple[int, ...]]] = Counter()
    for (kind, ranks), count in groups.items():
        # Experts are dealt out over ranks of the other axes; nothing else exchanges all with all.
        axes = ("ep",) if kind == ALL_TO_ALL else tuple(_differing(ranks, degrees))
        sent[axes, ranks] += count
    return [
        {"axes": list(axes), "ranks": list(ranks), "bytes": count}
        for (axes, ranks), count in sent.items()
        if count
    ]


def _differing(ranks: tuple[int, ...], degrees: dict[str, int]) -> Iterator[str]:
    """Yield the axes in which ranks differ."""
    size = 1
    inner = {axis: (size, size := size * degree) for axis, degree in reversed(degrees.items())}
    for axis, (below, through) in reversed(inner.items()):
        if any(one % through // below != other % through // below for one, other in pairwise(ranks)):
            yield axis
