"""Degrees are cut to as few ranks as still show what each does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.rehearsal.world import cut_world

DEGREES = st.sampled_from([1, 2, 3, 4, 8])


@pytest.mark.parametrize(
    ("degrees", "pp", "ranks", "left", "cuts"),
    [
        (Degrees(tp=2), 1, 4, {"tp": 2}, ()),
        # How many shard the data is left to the number of ranks: some do, where there is room.
        (Degrees(tp=2, dp_shard_is_known=False), 1, 4, {"tp": 2, "dp_shard": 2}, ()),
        (Degrees(tp=2, cp=2, dp_shard_is_known=False), 1, 4, {"tp": 2, "cp": 2}, ()),
        (Degrees(tp=2, ep=2, dp_shard=2), 1, 4, {"tp": 2, "ep": 2, "dp_shard": 2}, ()),
        (Degrees(tp=2, dp_shard=64), 1, 4, {"tp": 2, "dp_shard": 2}, ("dp_shard 64 -> 2",)),
        (Degrees(tp=2, dp_shard=5), 1, 4, {"tp": 2, "dp_shard": 2}, ("dp_shard 5 -> 2",)),
        (
            Degrees(tp=1, ep=32, dp_shard=256),
            1,
            4,
            {"ep": 2, "dp_shard": 2},
            ("ep 32 -> 2", "dp_shard 256 -> 2"),
        ),
        # Heads are split by TP: its degree goes last, and not without saying so.
        (Degrees(tp=4, dp_shard=64), 2, 4, {"tp": 4}, ("pp 2 -> 1", "dp_shard 64 -> 1")),
        (Degrees(tp=8), 1, 4, {"tp": 4}, ("tp 8 -> 4",)),
        (Degrees(tp=8), 1, 8, {"tp": 8}, ()),
        (Degrees(tp=2, dp_shard=4), 2, 8, {"tp": 2, "pp": 2, "dp_shard": 2}, ("dp_shard 4 -> 2",)),
    ],
)
def test_degrees_are_cut_to_what_still_shows_them(
    degrees: Degrees, pp: int, ranks: int, left: dict[str, int], cuts: tuple[str, ...]
) -> None:
    world = cut_world(degrees, pp, 2 * pp, ranks)
    fields = ("tp", "cp", "ep", "dp_shard", "dp_replicate")
    found = {field: getattr(world.degrees, field) for field in fields} | {"pp": world.pp}
    assert {field: degree for field, degree in found.items() if degree > 1} == left
    assert world.cuts == cuts


@pytest.mark.parametrize(
    ("microbatches", "pp", "ranks", "left", "cut"),
    [
        # Fewer than stages: what refuses these is to refuse them here.
        (1, 2, 4, 1, False),
        (4, 8, 4, 1, True),
        (8, 8, 4, 2, True),
        (8, 2, 4, 8, False),
        (64, 2, 4, 8, True),
        # No pipeline, no microbatches.
        (8, 1, 4, 1, False),
        (8, 2, 1, 1, False),
    ],
)
def test_a_pipeline_stays_as_busy(microbatches: int, pp: int, ranks: int, left: int, cut: bool) -> None:
    world = cut_world(Degrees(tp=1), pp, microbatches, ranks)
    assert (world.microbatches, any("microbatches" in one for one in world.cuts)) == (left, cut)


@settings(deadline=None)
@given(tp=DEGREES, ep=DEGREES, cp=DEGREES, dp_shard=DEGREES, dp_replicate=DEGREES, pp=DEGREES, ranks=DEGREES)
def test_a_world_has_no_more_ranks_than_there_may_be_and_makes_a_mesh(
    tp: int, ep: int, cp: int, dp_shard: int, dp_replicate: int, pp: int, ranks: int
) -> None:
    degrees = Degrees(tp=tp, ep=ep, cp=cp, dp_shard=dp_shard, dp_replicate=dp_replicate)
    world = cut_world(degrees, pp, pp, ranks)
    assert world.ranks <= ranks
    assert world.degrees.makes_a_mesh
    # What is not said to be cut is as requested.
    said = {cut.partition(" ")[0] for cut in world.cuts}
    for field in ("tp", "ep", "cp", "dp_shard", "dp_replicate"):
        assert (getattr(world.degrees, field) != getattr(degrees, field)) == (field in said)
