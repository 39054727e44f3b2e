"""What must divide: the rule codes, the dimensions a plan shards, and the arithmetic of degrees.

A tensor parallel (TP) degree is compatible with a plan when it divides the size of every sharded
dimension, so the compatible degrees are the divisors of the greatest common divisor of the sizes.
Nothing else in this project decides compatibility.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One kind of dimension that tensor parallelism splits evenly or not at all.

    Attributes:
        code: stable name, e.g. ``TP002``.
        dim: what torchtitan calls the dimension, e.g. ``n_kv_heads``.
        why: why an uneven split cannot work.
        source: the upstream file or issue that the rule follows.
    """

    code: str
    dim: str
    why: str
    source: str


RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule(
            "TP001",
            "n_heads",
            "wq is split by columns and wo by rows, so that every rank computes whole query heads",
            "torchtitan models/*/parallelize.py; https://github.com/pytorch/torchtitan/issues/2574",
        ),
        Rule(
            "TP002",
            "n_kv_heads",
            "wk and wv are split by columns, so that every rank computes whole key-value heads",
            "torchtitan models/*/parallelize.py; https://github.com/pytorch/torchtitan/issues/2574",
        ),
        Rule(
            "TP003",
            "n_key_heads",
            "the query and key projections of a gated-delta layer are split by whole key heads",
            "torchtitan models/qwen3_5/model.py (Qwen35Model.Config.update_from_config)",
        ),
        Rule(
            "TP004",
            "n_value_heads",
            "the value projections of a gated-delta layer are split by whole value heads",
            "torchtitan models/qwen3_5/model.py (Qwen35Model.Config.update_from_config)",
        ),
    )
}


@dataclass(frozen=True)
class ShardedDim:
    """A dimension that the plan splits over the TP axis.

    Attributes:
        code: a key of `RULES`.
        size: the global size, in units that cannot be cut (heads, not rows).
        layers: indices of the layers that have this dimension at this size, ascending.
        consequence: what a run with a degree that does not divide ``size`` does.
    """

    code: str
    size: int
    layers: tuple[int, ...]
    consequence: str

    @property
    def rule(self) -> Rule:
        """The rule behind `code`."""
        return RULES[self.code]

    @property
    def name(self) -> str:
        """Torchtitan's name of the dimension."""
        return self.rule.dim

    def allows(self, tp: int) -> bool:
        """Whether ``tp`` ranks each get the same number of whole units."""
        return self.size % tp == 0


@dataclass(frozen=True)
class Plan:
    """Everything that a model's own parallelization shards over the TP axis.

    Attributes:
        model: the name to show people, e.g. ``Qwen3.5-MoE``.
        dims: the sharded dimensions.
        n_layers: the number of layers that the layer indices count.
        how_to_change: template of the advice for this torchtitan line, with ``{tp}`` for the degree.
        unread: layers whose sharded dimensions could not be read; a plan that has any can still prove a
            degree wrong, but never right.
    """

    model: str
    dims: tuple[ShardedDim, ...]
    n_layers: int
    how_to_change: str
    unread: tuple[str, ...] = ()

    def violations(self, tp: int) -> tuple[ShardedDim, ...]:
        """The dimensions that ``tp`` does not divide, the tightest first."""
        return tuple(sorted((d for d in self.dims if not d.allows(tp)), key=lambda d: (d.size, d.code)))

    def valid_degrees(self) -> list[int]:
        """Every compatible TP degree, ascending; 1 is always among them."""
        return divisors(math.gcd(*(dim.size for dim in self.dims)))


def divisors(n: int) -> list[int]:
    """The positive divisors of ``n`` > 0, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def group_by_size(
    found: Iterable[tuple[str, int, int]], consequences: Mapping[str, str]
) -> tuple[ShardedDim, ...]:
    """Merge ``(code, size, layer)`` readings into one `ShardedDim` per code and size."""
    layers: dict[tuple[str, int], list[int]] = {}
    for code, size, layer in found:
        layers.setdefault((code, size), []).append(layer)
    return tuple(
        ShardedDim(code, size, tuple(indices), consequences[code]) for (code, size), indices in layers.items()
    )


def describe_layers(layers: Sequence[int], n_layers: int) -> str:
    """Which layers, in few words: ``layers 3, 7, ..., 39 (10 of 40)``, ``layers 0-2 (3 of 40)``."""
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
