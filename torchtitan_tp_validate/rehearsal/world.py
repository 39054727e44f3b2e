"""Cut the degrees of a run to as few ranks as still show what each of them does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from torchtitan_tp_validate.degrees import Degrees

_FIELDS = ("tp", "pp", "cp", "ep", "dp_replicate", "dp_shard")


@dataclass(frozen=True)
class World:
    """The degrees that a run is rehearsed at.

    Attributes:
        degrees: of everything but the pipeline.
        pp: pipeline parallel degree.
        microbatches: in a local batch, which a pipeline takes one by one.
        cuts: what is smaller than requested, as ``dp_shard 64 -> 2``.
    """

    degrees: Degrees
    pp: int
    microbatches: int
    cuts: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """How many it takes."""
        return self.degrees.ranks * self.pp


def cut_world(degrees: Degrees, pp: int, microbatches: int, ranks: int) -> World:
    """Return the smallest world that still has as much of every axis as ``ranks`` ranks allow.

    An axis of degree 2 shows what it does; one of degree 1 does nothing. Tensor parallelism is what heads and
    widths are split by: its degree is kept before anything else is.

    Args:
        degrees: of the run; where its data shards are left to the number of ranks, there are at least 2 if
            there is room.
        pp: its pipeline parallel degree.
        microbatches: its own.
        ranks: the most that there may be.
    """
    requested = {field: getattr(degrees, field) for field in _FIELDS if field != "pp"} | {"pp": pp}
    if not degrees.dp_shard_is_known:
        # A multiple of what everybody may ask for; which one does not matter.
        requested["dp_shard"] = max(2, degrees.dp_shard)
    wanted = [field for field in _FIELDS if field != "dp_shard" or degrees.dp_shard_is_known]
    best = min(_worlds(degrees, requested, ranks), key=lambda world: _loss(requested, world, wanted))
    cut = {field: degree for field, degree in best.items() if field != "pp"}
    known = degrees.dp_shard_is_known
    cuts = tuple(
        f"{field} {requested[field]} -> {best[field]}"
        for field in _FIELDS
        if best[field] != requested[field] and (known or field != "dp_shard")
    )
    small = _few(microbatches, pp, best["pp"])
    if small != microbatches and best["pp"] > 1:
        cuts = (*cuts, f"microbatches {microbatches} -> {small}")
    return World(degrees.vary(**cut), best["pp"], small, cuts)


def _few(microbatches: int, pp: int, small_pp: int) -> int:
    """Return how many microbatches keep a smaller pipeline as busy, up to two for each of two stages a rank.

    A schedule that refuses fewer microbatches than stages refuses these too. A model that is not cut into
    stages takes its batch at once.
    """
    return min(max(1, microbatches * small_pp // pp), 4 * small_pp) if small_pp > 1 else 1


def _worlds(degrees: Degrees, requested: dict[str, int], ranks: int) -> Iterator[dict[str, int]]:
    """Yield every world that is no larger: of divisors of what is requested, or of 2."""
    choices = [
        [degree for degree in range(1, min(most, ranks) + 1) if most % degree == 0 or degree == 2]
        for most in requested.values()
    ]
    for values in itertools.product(*choices):
        world = dict(zip(requested, values, strict=True))
        split = degrees.vary(**{field: degree for field, degree in world.items() if field != "pp"})
        if split.ranks * world["pp"] <= ranks and split.makes_a_mesh:
            yield world


def _loss(requested: dict[str, int], world: dict[str, int], wanted: list[str]) -> tuple[float, ...]:
    """Return what is lost: of tensor parallelism, whole axes, wanted ones first; and what is left."""
    gone = [field for field, degree in requested.items() if degree > 1 and world[field] == 1]
    ranks = math.prod(degree for field, degree in world.items() if field != "ep")
    return (
        requested["tp"] / world["tp"],
        len({*gone} & {*wanted}),
        len(gone),
        ranks,
        sum(world.values()),
    )
