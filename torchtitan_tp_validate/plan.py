"""What a model's parallelization splits over the mesh axes, and the arithmetic of the degrees that allows.

Degrees are compatible with a model when every dimension that is split over a mesh axis allows the degree
of that axis. Most dimensions allow exactly the degrees that divide their size, so the compatible tensor
parallel (TP) degrees are among the divisors of the greatest common divisor of those sizes. What is split,
and how, depends on the degrees itself: whatever varies one asks for the plan at each. Nothing else in this
project decides compatibility.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fractions import Fraction
from functools import cached_property

from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.rules import ALIGNMENT, RULES, Line, Otherwise, Rule


class Split(Enum):
    """How a dimension may be cut."""

    EVEN = "even"
    """Every rank gets the same number of units."""
    NOT_EMPTY = "not empty"
    """Shards may differ in size (each is the size over the degree, rounded up), but none is empty."""
    IN_STEP = "in step"
    """A dimension of this size and one of twice it are cut in the same places."""
    SHARED = "shared"
    """Every rank gets the same number of units, or the same number of ranks share each unit."""
    ALIGNED = "aligned"
    """Shards may differ in size, but each is a multiple of `ALIGNMENT`."""

    def problem(self, degree: int | Fraction) -> str:
        """Return what is wrong with a dimension that ``degree`` ranks cannot share, to follow its size."""
        if self is Split.EVEN:
            return f"is not a multiple of {degree}"
        if self is Split.NOT_EMPTY:
            return f"leaves one of {degree} ranks empty"
        if self is Split.SHARED:
            return f"is neither a multiple nor a divisor of {degree}"
        if self is Split.ALIGNED and degree == 1:
            return f"is not a multiple of {ALIGNMENT}"
        if self is Split.ALIGNED:
            return f"does not give each of {degree} ranks a multiple of {ALIGNMENT}"
        return f"is not cut where its double is, on {degree} ranks"

    def allows(self, size: int, degree: int | Fraction) -> bool:
        """Return whether ``degree`` ranks can share ``size`` units this way; no rank is a fraction."""
        if degree.denominator != 1:
            return False
        shard = -(-size // degree)
        if self is Split.EVEN:
            return size % degree == 0
        if self is Split.NOT_EMPTY:
            return shard * (degree - 1) < size
        if self is Split.SHARED:
            return size % degree == 0 or degree % size == 0
        if self is Split.ALIGNED:
            # The last shard is what full ones leave, so it is aligned when they and the whole are.
            return size % ALIGNMENT == shard % ALIGNMENT == 0
        return -(-2 * size // degree) == 2 * shard


@dataclass(frozen=True)
class ShardedDim:
    """A dimension that the plan splits over a mesh axis.

    Attributes:
        code: a key of `RULES`.
        size: the global size, in units that cannot be cut (heads, or rows where there are no heads).
        layers: indices of the layers that have this dimension at this size, ascending.
        otherwise: what a run with a degree that it does not allow does.
        places: where it is, when not in a layer.
        label: its name, where the rule's own says too little.
        split: how it may be cut.
        multiple: how many equal parts every rank's part must have by itself. With expert parallelism, a
            fraction: of the ranks that shard the data, several hold the same experts' shards.
    """

    code: str
    size: int
    layers: tuple[int, ...]
    otherwise: Otherwise
    places: tuple[str, ...] = ()
    label: str = ""
    split: Split = Split.EVEN
    multiple: int | Fraction = 1

    @property
    def rule(self) -> Rule:
        """The rule behind `code`."""
        return RULES[self.code]

    @property
    def axis(self) -> Axis:
        """The mesh axis that splits it."""
        return Axis(self.rule.axis)

    @property
    def name(self) -> str:
        """Torchtitan's name of the dimension."""
        return self.label or self.rule.dim

    def allows(self, degree: int) -> bool:
        """Return whether this many ranks can share it."""
        return self.split.allows(self.size, degree * self.multiple)

    def problem(self, degree: int) -> str:
        """Return what is wrong when they cannot, to follow its size."""
        return self.split.problem(degree * self.multiple)


_NO_DEGREES = Degrees(tp=1)


@dataclass(frozen=True)
class Plan:
    """Everything that a model's own parallelization splits over the mesh axes, at some degrees.

    Attributes:
        model: the name to show people, e.g. ``Qwen3.5-MoE``.
        dims: the sharded dimensions.
        n_layers: the number of layers that the layer indices count.
        how_to_change: template of the advice for this torchtitan line, with ``{flag}`` and ``{degree}``,
            and of what is to be written into a file, a line each.
        unread: what could not be read; a plan that has any can still prove a degree wrong, never right.
        not_judged: rules that were left out for want of an input, e.g. ``TP009: the run has no seq_len``; the
            verdict holds for the others, and says so.
        shared_kv: what takes the place of n_kv_heads where several ranks may share a key-value head;
            empty where nothing makes that work.
        how_to_replicate: how they are allowed to, in this torchtitan line.
        degrees: those that it was read at.
        read_at: reads the model at other degrees; None where all of them split the same.
        listed_up_to: the largest TP degree that is listed where no dimension limits it.
    """

    model: str
    dims: tuple[ShardedDim, ...]
    n_layers: int
    how_to_change: tuple[str, ...]
    unread: tuple[str, ...] = ()
    not_judged: tuple[str, ...] = ()
    shared_kv: tuple[ShardedDim, ...] = ()
    how_to_replicate: str = ""
    degrees: Degrees = _NO_DEGREES
    read_at: Callable[[Degrees], Plan] | None = field(default=None, compare=False, repr=False)
    listed_up_to: int = 1

    def at(self, degrees: Degrees) -> Plan:
        """Return the plan at these degrees.

        Raises:
            PlanError: the model cannot be read at them.
        """
        if self.read_at is not None:
            return self.read_at(degrees)
        return self.with_kv_replication() if degrees.replicate_kv_heads else self

    def with_kv_replication(self) -> Plan:
        """Return the plan when several ranks may share a key-value head; the same one where they cannot."""
        if not self.shared_kv:
            return self
        kept = (dim for dim in self.dims if dim.code not in {shared.code for shared in self.shared_kv})
        degrees = replace(self.degrees, replicate_kv_heads=True)
        return replace(self, dims=(*kept, *self.shared_kv), degrees=degrees)

    def of_own_function(self) -> Plan:
        """Return what is known of it where a function of somebody's own parallelizes the model: the heads."""
        heads = tuple(dim for dim in self.dims if dim.code in ("TP001", "TP002"))
        return replace(self, dims=heads, shared_kv=(), not_judged=(_KNOWN_TO_ITS_OWN,))

    @property
    def replication_degrees(self) -> list[int]:
        """The TP degrees that KV-head replication would add, ascending."""
        return self.added_by_replication(self.degrees)

    def added_by_replication(self, degrees: Degrees) -> list[int]:
        """Return the TP degrees that KV-head replication would add to those that are valid, ascending."""
        if not self.shared_kv:
            return []
        shared = replace(degrees, replicate_kv_heads=True)
        return sorted({*self.valid_degrees(degrees=shared)} - {*self.valid_degrees(degrees=degrees)})

    def violations(self, degrees: Degrees) -> tuple[ShardedDim, ...]:
        """Return the dimensions that do not allow these degrees: the TP axis first, the tightest first."""
        broken = [dim for dim in self.at(degrees).dims if not dim.allows(degrees.of(dim.axis))]
        order = list(Axis)
        return tuple(sorted(broken, key=lambda dim: (order.index(dim.axis), dim.size, dim.code)))

    def allows(self, degrees: Degrees) -> bool:
        """Return whether every dimension allows these degrees: as `violations` has it, at less cost."""
        return all(
            limit.allows(degrees.of(axis)) for axis, limits in self.at(degrees)._limits for limit in limits
        )

    def accepts(self, degrees: Degrees) -> bool:
        """Return whether these degrees are found compatible, as a run that splits nothing is unread."""
        if degrees.splits_nothing:
            return True
        try:
            return self.allows(degrees) and not self.at(degrees).unread
        except PlanError:  # not judged is not accepted
            return False

    def valid_degrees(self, axis: Axis = Axis.TP, degrees: Degrees | None = None) -> list[int]:
        """Return every degree of one axis that is accepted together with the other degrees, ascending.

        Where nothing is split over the TP axis, the degrees up to `listed_up_to` stand for all.

        Args:
            axis: which degree varies.
            degrees: the others; by default those that the plan was read at.
        """
        degrees = self.degrees if degrees is None else degrees
        runs = (degrees.vary(**{axis.value: value}) for value in self.candidates(axis, degrees))
        return [run.of(axis) for run in runs if self.accepts(run)]

    def candidates(self, axis: Axis, degrees: Degrees) -> list[int]:
        """Return what to look among for the valid degrees of an axis, ascending; it leaves none out.

        What must divide does so at any degree.
        """
        reference = degrees.vary(tp=1) if axis is Axis.TP else degrees
        try:
            dims = [dim for dim in self.at(reference).dims if dim.axis is axis]
        except PlanError:
            dims = [dim for dim in self.dims if dim.axis is axis]
        even = math.gcd(*(dim.size * dim.multiple.denominator for dim in dims if dim.split is Split.EVEN))
        most = max((dim.size for dim in dims), default=self.listed_up_to if axis is Axis.TP else 1)
        found = divisors(even) if even else list(range(1, most + 1))
        if axis is not Axis.FSDP:
            return found
        # With fewer ranks than experts nothing need divide.
        most = degrees.of(axis)
        fewer = range(1, most + 1) if most <= _MOST_SHARDS else divisors(most)
        return sorted({*found, *fewer})

    @cached_property
    def _limits(self) -> list[tuple[Axis, list[ShardedDim]]]:
        """One dimension for all that allow the same degrees: a model of many layers may have thousands."""
        alike: dict[tuple[Axis, Split, int | Fraction], dict[int, ShardedDim]] = {}
        for dim in self.dims:
            alike.setdefault((dim.axis, dim.split, dim.multiple), {})[dim.size] = dim
        limits = []
        for (axis, split, _), by_size in alike.items():
            if split is Split.EVEN:
                # A degree divides all sizes when it divides their greatest common divisor.
                common = math.gcd(*by_size)
                by_size = {common: replace(next(iter(by_size.values())), size=common)}
            limits.append((axis, list(by_size.values())))
        return limits


_KNOWN_TO_ITS_OWN = (
    "all but TP001 and TP002: what else is split, the model's own parallelize function alone knows"
)
_MOST_SHARDS = 1024
"""A degree of data parallelism up to which all smaller ones are tried; beyond it, those that divide it."""


def divisors(n: int) -> list[int]:
    """Return the positive divisors of ``n`` > 0, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in few words: ``1-4, 8`` for 1, 2, 3, 4, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs]
    return ", ".join(parts)


class PlanBuilder:
    """What a reader has found so far, merged into one `ShardedDim` per kind and size.

    Attributes:
        not_judged: rules that were left out, and why, as in `Plan`.
    """

    def __init__(self, line: Line) -> None:
        """Begin a plan of what ``line`` splits."""
        self.not_judged: list[str] = []
        self._line = line
        self._found: dict[_Kind, tuple[set[int], list[str]]] = {}

    def add(
        self,
        code: str,
        size: int,
        *,
        layers: Iterable[int] = (),
        place: str = "",
        label: str = "",
        split: Split = Split.EVEN,
        multiple: int | Fraction = 1,
        line: Line | None = None,
    ) -> None:
        """Note a dimension in some layers, or at a place outside all layers.

        Args:
            line: where it is not the plan's own that tells what an uneven split does.
        """
        kind = (code, label, size, split, multiple, self._line if line is None else line)
        layers_of_it, places = self._found.setdefault(kind, (set(), []))
        layers_of_it.update(layers)
        if not layers_of_it and place not in places:
            places.append(place)

    def leave_out(self, what: str) -> None:
        """Note that a rule is not applied, and why, once."""
        if what not in self.not_judged:
            self.not_judged.append(what)

    def dims(self) -> tuple[ShardedDim, ...]:
        """Return the dimensions, in the order they were found."""
        return tuple(
            ShardedDim(
                code,
                size,
                tuple(sorted(layers)),
                RULES[code].otherwise[line],
                tuple(places),
                label,
                split,
                multiple,
            )
            for (code, label, size, split, multiple, line), (layers, places) in self._found.items()
        )


_Kind = tuple[str, str, int, Split, int | Fraction, Line]


def describe_layers(layers: Sequence[int], n_layers: int) -> str:
    """Return which layers, in few words: ``layers 3, 7, ..., 39 (10 of 40)``, ``layers 0-2 (3 of 40)``."""
    count = f"({len(layers)} of {n_layers})"
    if len(layers) == n_layers:
        return "the only layer" if n_layers == 1 else f"all {n_layers} layers"
    if len(layers) == 1:
        return f"layer {layers[0]} {count}"
    contiguous = layers[-1] - layers[0] == len(layers) - 1
    if contiguous and len(layers) > 2:
        return f"layers {layers[0]}-{layers[-1]} {count}"
    if len(layers) > 4:
        return f"layers {layers[0]}, {layers[1]}, ..., {layers[-1]} {count}"
    return f"layers {', '.join(map(str, layers))} {count}"


def describe_places(dim: ShardedDim, n_layers: int) -> str:
    """Where a dimension is, in few words."""
    where = [describe_layers(dim.layers, n_layers)] if dim.layers else []
    return " and ".join((*where, *dim.places))
