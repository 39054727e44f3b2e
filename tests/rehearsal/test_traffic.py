"""What counts as sent, and in which axes of a layout."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.peak import PeakMemory
from torchtitan_tp_validate.rehearsal.traffic import SentBytes, by_axes, bytes_sent, sharing

SIXTEEN = {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 2, "tp": 2}


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This process is the second of four that are not there."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all gather", 300), ("reduce scatter", 75), ("all reduce", 150), ("all to all", 75), ("send", 100)],
)
def test_no_rank_sends_more_than_it_has_to(kind: str, sent: int) -> None:
    assert bytes_sent(kind, 100, 4) == sent
    assert bytes_sent(kind, 100, 1) == 0


def test_every_collective_is_counted_by_what_this_rank_puts_in(four_ranks: None) -> None:
    part, whole = torch.zeros(8), torch.zeros(32)
    with SentBytes() as counter:
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_reduce(part)
        dist.all_to_all_single(torch.zeros(8), part)
        dist.broadcast(part, 0)
        dist.barrier()
        dist.send(part, 3)
        dist.recv(part, 0)
    ranks = (0, 1, 2, 3)
    assert counter.groups == {
        ("all gather", ranks): 3 * 32,
        ("reduce scatter", ranks): 3 * 32,
        ("all reduce", ranks): 2 * 24,
        ("all to all", ranks): 24,
        ("send", ranks): 32,
        ("send", (1, 3)): 32,
    }


def test_a_collective_that_is_not_known_is_told(four_ranks: None) -> None:
    said = r"a step calls c10d\.gather_\.default, and nobody knows what that sends\."
    with SentBytes(), pytest.raises(RehearsalError, match=said):
        dist.gather(torch.zeros(1), dst=0)


@pytest.mark.parametrize(
    ("kind", "ranks", "axes"),
    [
        ("all reduce", (0, 1), ["tp"]),
        ("all reduce", (0, 2), ["cp"]),
        ("all gather", (1, 5), ["dp_shard"]),
        ("all gather", (0, 2, 4, 6), ["dp_shard", "cp"]),
        ("all to all", (0, 1, 2, 3), ["ep"]),
        ("all reduce", tuple(range(8)), ["dp_shard", "cp", "tp"]),
        ("send", (1, 9), ["pp"]),
    ],
)
def test_a_group_is_of_the_axes_in_which_its_ranks_differ(
    kind: str, ranks: tuple[int, ...], axes: list[str]
) -> None:
    found = by_axes(Counter({(kind, ranks): 5, (kind, (0,)): 0}), SIXTEEN)
    assert found == [{"axes": axes, "ranks": list(ranks), "bytes": 5}]


def test_tokens_are_shared_out_evenly_where_their_numbers_are_not_known() -> None:
    with FakeTensorMode():
        counts = torch.zeros(4, dtype=torch.int64)
    with sharing(10):
        assert counts.tolist() == [3, 3, 2, 2]


def test_the_memory_of_a_step_is_that_of_the_tensors_that_it_makes_at_its_peak() -> None:
    hidden, narrow, scalar = 4 * 8 * 32, 4 * 8 * 4, 4
    weights = 4 * (16 * 32 + 32 * 4)
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            x, first, second = torch.ones(8, 16), torch.ones(16, 32), torch.ones(32, 4)
            first.requires_grad_()
            second.requires_grad_()
            with PeakMemory() as memory:
                loss = (torch.relu(x @ first) @ second).sum()
                # relu keeps what it makes; what it was given goes.
                assert memory.peak == max(2 * hidden, hidden + narrow + scalar)
                loss.backward()
                assert hidden + weights < memory.peak < 2 * hidden + weights + narrow + 2 * scalar
                first.grad.untyped_storage().resize_(0)
                before, memory.peak = memory.peak, 0
                torch.ones(1)
        assert memory.peak == 4 * 32 * 4 + 2 * scalar < before
    assert torch.UntypedStorage.resize_.__name__ == "resize_"
