"""What torch's search finds with what is remembered is what it finds without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import _redistribute as redistribute

from torchtitan_tp_validate.rehearsal.redistributions import remember_next_placements

pytestmark = pytest.mark.requires(torchtitan="0.3")
PLACEMENTS = (
    (Shard(0), Shard(0)),
    (Shard(1), Shard(0)),
    (Replicate(), Shard(1)),
    (Partial(), Shard(1)),
    (Partial(), Partial()),
)


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    dist.destroy_process_group()


def paths(mesh: Any) -> list[str]:
    """The paths that a new planner finds between all placements."""
    planner = redistribute.DTensorRedistributePlanner
    specs = [DTensor.from_local(torch.ones(4, 4), mesh, placements)._spec for placements in PLACEMENTS]
    asked = planner(mesh, specs[0].tensor_meta)
    states = [planner.DistState(spec.placements, spec.shard_order) for spec in specs]
    targets = [state for state in states if not any(one.is_partial() for one in state.placements)]
    return [str(asked.find_min_cost_path(one, other)) for one in states for other in targets]


def test_placements_are_asked_for_once_and_the_paths_are_the_same(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner: Any = redistribute.DTensorRedistributePlanner
    ask, asked = planner.get_next_state, Counter[Any]()

    def get_next_state(self: Any, placements: Any, order: Any) -> Any:
        asked[placements, order] += 1
        return ask(self, placements, order)

    monkeypatch.setattr(planner, "get_next_state", get_next_state)
    wanted = paths(mesh)
    assert max(asked.values()) > 1
    asked.clear()
    remember_next_placements()
    assert paths(mesh) == wanted
    assert {*asked.values()} == {1}


def test_a_planner_that_goes_by_something_else_is_asked_every_time(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner: Any = redistribute.DTensorRedistributePlanner
    monkeypatch.setattr(planner, "get_next_state", lambda self, placements, order: {"found": next(found)})
    remember_next_placements()
    spec = DTensor.from_local(torch.ones(4, 4), mesh, PLACEMENTS[0])._spec
    asked, found = planner(mesh, spec.tensor_meta), iter(range(9))
    assert [asked.get_next_state(spec.placements, spec.shard_order) for _ in range(2)] == [{"found": 0}] * 2
    asked.of_another_torch = True
    assert asked.get_next_state(spec.placements, spec.shard_order) == {"found": 1}
